"""Draws the figures of docs/how-it-works.md: python docs/figures/make_figures.py [FOLDER]"""

import sys
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

PLUS, MINUS, FIXED, TRAINED, DATA = "#1b7f79", "#c8553d", "#d9dee2", "#f2c14e", "#8fb8de"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "randlora", "font.size": 10}


def canvas(width: float, height: float, limits: tuple[float, float]):
    """(figure, axes) in units of a cell, y downwards."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, limits[0]), ylim=(limits[1], 0), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, fill, label="", **style):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor="#444", lw=0.8))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", **style)


def note(axes, x, y, text, **style):
    axes.text(x, y, text, **({"ha": "center", "va": "center"} | style))


def arrow(axes, start, end):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#444"))


def ternary(axes, x, y, matrix, size=0.5):
    """Cells of -1, 0, +1."""
    for (row, column), value in np.ndenumerate(matrix):
        color = {1: PLUS, -1: MINUS, 0: "white"}[int(value)]
        cell = (x + column * size, y + row * size)
        axes.add_patch(Rectangle(cell, size, size, facecolor=color, edgecolor="#bbb", lw=0.5))


def random_ternary(rows, columns, density, seed):
    generator = np.random.default_rng(seed)
    kept = generator.random((rows, columns)) < density
    return kept * generator.choice([-1, 1], (rows, columns))


def update():
    """dW = B A': shapes, what is fixed, what is trained."""
    figure, axes = canvas(9, 3.5, (18, 7))
    box(axes, 0.5, 1, 3, 5, DATA, "dW / s")
    note(axes, 2, 0.5, "(D, d), up to full rank")
    note(axes, 4.1, 3.5, "=", size=16)
    box(axes, 4.8, 1, 4, 5, FIXED)
    axes.plot([6.8, 6.8], [1, 6], color="#444", lw=0.8, ls="--")
    note(axes, 5.8, 3.5, "j = 0\nn columns")
    note(axes, 7.8, 3.5, "j = 1\n...")
    note(axes, 6.8, 0.5, "B (D, K), fixed, from a seed")
    note(axes, 9.4, 3.5, "x", size=12)
    box(axes, 10, 1.5, 3, 4, "white")
    for j, label in enumerate(("$j = 0$", "$j = 1$")):
        box(axes, 10, 1.5 + 2 * j, 3, 2, "white", f"{label}: n scaled\ncopies of A[j]")
    note(axes, 11.5, 1, "A' (K, d)")
    box(axes, 14, 1.5, 1, 1.6, TRAINED, r"$\lambda$")
    note(axes, 14.5, 1, "(r, n)")
    box(axes, 15.4, 1.5, 2.2, 1.6, TRAINED, r"$\gamma$")
    note(axes, 16.5, 1, "(n, d)")
    box(axes, 14.6, 4, 2.6, 0.9, FIXED, "A (r, d)")
    note(axes, 15.9, 5.4, "A'[c, k] = λ[j, i] A[j, k] γ[i, k]", size=9)
    note(axes, 15.9, 6, "c = j n + i", size=9)
    return figure


def a_side():
    """The n bases of a rank index share their support: a dense product on what it gathers."""
    figure, axes = canvas(9, 3.6, (18, 7.2))
    row = np.array([[0, 1, 0, 0, -1, 0, 1, 0, 0, 0, -1, 0]])
    ternary(axes, 1, 1, row)
    note(axes, 0.9, 1.25, "A[j]", ha="right")
    support = np.flatnonzero(row[0])
    note(axes, 4, 0.5, "S: the 4 of d = 12 inputs where row j of A is not zero", size=9)
    for k in range(12):
        used = k in support
        box(axes, 1 + 0.5 * k, 3, 0.5, 3.2, DATA if used else "white")
    note(axes, 4, 6.5, "x (T, d)", size=9)
    for slot, k in enumerate(support):
        arrow(axes, (1.25 + 0.5 * k, 1.6), (1.25 + 0.5 * k, 2.9))
        box(axes, 9 + 0.6 * slot, 3, 0.6, 3.2, DATA)
    arrow(axes, (7.2, 4.6), (8.8, 4.6))
    note(axes, 8, 4.2, "gather", size=9)
    note(axes, 10.2, 2.6, "(T, |S|)", size=9)
    note(axes, 11.9, 4.6, "x", size=12)
    for i in range(3):
        for slot in range(4):
            box(axes, 12.4 + 0.6 * i, 3.3 + 0.6 * slot, 0.6, 0.6, TRAINED)
    note(axes, 13.3, 2.6, "± λ γ   (|S|, n)", size=9)
    note(axes, 14.7, 4.6, "=", size=16)
    for i in range(3):
        box(axes, 15.2 + 0.6 * i, 3, 0.6, 3.2, "#e8eef4")
    note(axes, 16.1, 2.6, "V of j (T, n)", size=9)
    told = "density x T x d multiply-adds for each base; no factor is zero"
    note(axes, 9, 6.95, told, size=9)
    return figure


def sylvester(size):
    """Hadamard's matrix of a power of two, by Sylvester's doubling."""
    H = np.ones((1, 1), dtype=int)
    while len(H) < size:
        H = np.block([[H, H], [H, -H]])
    return H


def hadamard():
    """Hadamard bases: A by classes of columns, B a leading part of H, and a product with both."""
    figure, axes = canvas(9, 5.6, (18, 11.2))
    r, n, size = 4, 3, 0.3
    H, d, D, K = sylvester(16), r * n, 16, r * n
    classes = (DATA, TRAINED, "#9ec9a3", "#d8b4d8")
    note(axes, 3, 0.5, "A (r, d): a class of n columns has one pattern", size=9)
    ternary(axes, 1.2, 1.6, H[:r, np.arange(d) // n], size)
    for m in range(r):
        box(axes, 1.2 + m * n * size, 1.1, n * size, 0.35, classes[m], f"m = {m}", size=7)
    note(axes, 3, 3.5, "Each column has a random sign as well.", size=9)
    note(axes, 12.2, 0.5, "B (D, K): the first rows and columns of H", size=9)
    ternary(axes, 10.4, 0.9, H[:D, :K], size)
    told = "Each row and each\ncolumn has a\nrandom sign as well."
    note(axes, 14.4, 2.9, told, size=9, ha="left")
    for x, color, value in ((1.9, PLUS, "+1"), (3.5, MINUS, "-1")):
        axes.add_patch(Rectangle((x, 4.45), size, size, facecolor=color, lw=0))
        note(axes, x + 0.5, 4.6, value, size=9, ha="left")

    top, height = 6.9, 2.2
    for m in range(r):
        box(axes, 0.6 + 0.6 * m, top, 0.6, height, classes[m])
        box(axes, 4 + 0.55 * m, top + 0.55 * m, 0.55, 0.55, classes[m])
        box(axes, 7.4 + 0.6 * m, top, 0.6, height, classes[m], f"m={m}", size=7)
        box(axes, 11.2 + 0.6 * m, top, 0.6, height, "#e8eef4", f"j={m}", size=7)
    box(axes, 15.4, top, 2, height, DATA)
    for x, text in (
        (1.8, "x (T, d)"),
        (5.1, "γ, with A's signs"),
        (8.6, "z (T, K)"),
        (12.4, "V (T, K)"),
        (16.4, "y (T, D)"),
    ):
        note(axes, x, top - 0.4, text, size=9)
    for start, end in ((6.4, 7.2), (10, 11), (13.8, 15.2)):
        arrow(axes, (start, top + 1.1), (end, top + 1.1))
    note(axes, 3.5, top + 1.1, "x", size=12)
    for x, text in (
        (3.6, "r products, n x n each,\nby torch's GEMM"),
        (10, "a transform over the r\nclasses, times λ\nand B's column signs"),
        (15, "a transform over\nthe K columns, times\nB's row signs"),
    ):
        note(axes, x, top + 3.1, text, size=9)
    told = "A transform over N numbers takes log2(N) additions for each and no multiplication."
    note(axes, 9, 11, told, size=9)
    return figure


def b_side():
    """A row of B as two runs of positions: rows of V are added, then subtracted."""
    figure, axes = canvas(9, 3.4, (18, 6.8))
    row = np.array([[0, 0, 1, 0, 0, -1, 0, 1, 0, 0, 0, -1, 0, 1, 0, 0]])
    ternary(axes, 1, 1, row, 0.45)
    note(axes, 0.9, 1.2, "B[o]", ha="right")
    note(axes, 4.6, 0.5, "K columns", size=9)
    box(axes, 1, 2.4, 2.7, 0.8, "white", "+  2  7  13", color=PLUS)
    box(axes, 3.7, 2.4, 2.2, 0.8, "white", "–  5  11", color=MINUS)
    note(axes, 3.5, 3.7, "list of the row: 16 bits per position", size=9)
    for index, place in zip((2, 7, 13, 5, 11), range(5), strict=True):
        color = PLUS if place < 3 else MINUS
        box(axes, 9.4, 1.2 + 0.8 * place, 4, 0.6, "#e8eef4", f"V[{index}], 32 tokens", size=9)
        note(axes, 9, 1.5 + 0.8 * place, "+" if place < 3 else "–", color=color, size=14)
    arrow(axes, (6.1, 2.8), (8.6, 2.8))
    arrow(axes, (13.6, 3), (14.9, 3))
    box(axes, 15, 2.7, 2.4, 0.6, DATA, "y[o]", size=9)
    note(axes, 11.4, 0.7, "a block of tokens, [column][token], stays in cache", size=9)
    told = "no multiplication: one load and one addition of a vector of tokens for each non-zero"
    note(axes, 9, 5.9, told, size=9)
    return figure


FIGURES = {
    "update": update,
    "hadamard": hadamard,
    "a-side": a_side,
    "b-side": b_side,
}


def main(folder: Path) -> None:
    with rc_context(STYLE):
        for name, draw in FIGURES.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
