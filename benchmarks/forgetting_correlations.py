"""Does the meter order runs as other measures of forgetting do? Tables of rank correlations."""

import statistics

from forgetting_curves import forgot, has, has_curve, points, selected
from forgetting_tables import MODELS, TEXTS, markdown

FEWEST = 4  # runs that have a rank correlation


def rank_correlation(pairs: list[tuple[float, float]]) -> str:
    """Spearman's."""
    if len(pairs) < FEWEST:
        return ""
    ranked = []
    for values in zip(*pairs, strict=True):
        order = sorted(range(len(values)), key=values.__getitem__)
        ranked.append([float(order.index(i)) for i in range(len(values))])
    return f"{statistics.correlation(*ranked):.2f}"


def correlations(rows: list[dict]) -> str:
    """Of the meter, KL(base, tuned) on what the base model wrote, with the rise of the loss on
    every text and with KL(base, tuned) on answers in chat: of runs as trained, and of all points of
    the dial."""
    names = {"own": "own text", **TEXTS}
    as_trained, dialed = ("own", "manual", "code", "prose", "chat"), ("manual", "chat")
    found = []
    for name, mine in by_model_and_task([row for row in rows if "meter" in row]):
        cells = [name, str(len(mine))]
        for text in as_trained:
            pairs = [(row["meter"], forgot(row, text)) for row in mine if has(row, text)]
            cells.append(rank_correlation(pairs))
        cells.append(str(sum(len(points(row, "meter")) for row in mine)))
        for text in dialed:
            pairs = []
            for row in mine:
                if has_curve(row, "meter") and has_curve(row, text):
                    curves = zip(points(row, "meter"), points(row, text), strict=True)
                    pairs += [(meter, rise) for (_, meter), (_, rise) in curves]
            cells.append(rank_correlation(pairs))
        if len(mine) >= FEWEST:
            found.append(cells)
    heads = [[names[text] for text in texts] for texts in (as_trained, dialed)]
    return markdown(["", "runs", *heads[0], "points", *heads[1]], found)


def correlations_of_the_task(rows: list[dict]) -> str:
    """Of KL(base, tuned) on the task's answers with the rise on the manual, as trained."""
    found = []
    for name, mine in by_model_and_task([row for row in rows if "kl" in row]):
        pairs = [(row["kl"], forgot(row, "manual")) for row in mine]
        found.append([name, str(len(mine)), rank_correlation(pairs)])
    return markdown(["", "runs", "manual"], found)


def correlations_of_skills(rows: list[dict]) -> str:
    """Of the meter after the second task with the rise of the loss on the first one meanwhile."""
    found = []
    for name, mine in by_model_and_task([row for row in rows if "skills" in row]):
        stages = [(row["meter"], row["skills"][row["task"]]) for row in mine]
        losses = [(meter, [each["held_out_loss"] for each in first]) for meter, first in stages]
        pairs = [(meter, after - before) for meter, (before, after) in losses]
        found.append([name, str(len(mine)), rank_correlation(pairs)])
    return markdown(["", "runs", "first task"], found)


def by_model_and_task(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """And by model, of all its tasks."""
    found = []
    for model, name in MODELS.items():
        of_model = selected(rows, model=model)
        tasks = dict.fromkeys(row["task"] for row in of_model)
        found += [(f"{name}, {task}", selected(of_model, task=task)) for task in tasks]
        found += [(f"{name}, all tasks", of_model)] if of_model else []
    return found
