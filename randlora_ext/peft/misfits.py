"""Whether the tensors that PEFT loads into an adapter are those that the adapter has."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..checks import at_most_ten, warn_user
from ..nn.adapted_layer import layers_by_path
from ..nn.state_dict import DIAGONALS


def check_names(
    model: nn.Module, adapter_name: str, named: Mapping[str, Tensor], what: str
) -> None:
    """Warns if tensors, by their names in `model`, fit an adapter only in part. PEFT returns such
    names, and few look at them.

    Raises RuntimeError if names differ by ``base_layer`` alone: then a layer's tensors are there
    and would not be used.

    Args:
        what: is said not to fit.
    """
    expected: set[str] = set()
    for path, layer in layers_by_path(model).items():
        if adapter_name not in layer.randlora_lambda:
            continue
        path = path.replace("_fsdp_wrapped_module.", "")
        expected |= {f"{path}.{diagonal}.{adapter_name}" for diagonal in DIAGONALS}
    given = {key for key in named if any(f".{diagonal}" in key for diagonal in DIAGONALS)}
    without_place = sorted(given - expected)
    missing = sorted(expected - given)

    def shortened(key: str) -> str:
        # PEFT has added the adapter's name to what has a place alone.
        return key.removesuffix(f".{adapter_name}").replace(".base_layer", "")

    found = {shortened(key) for key in without_place}
    renamed = [key for key in missing if shortened(key) in found]
    if renamed:
        raise RuntimeError(
            f"{what} does not fit: in it the names of {at_most_ten(renamed)} differ by base_layer. "
            "There or here alone target_parameters adapt the module around these layers; load it "
            "into a model with the same target_parameters"
        )
    for keys, why in (
        (without_place, "tensors have no place in the model and are not used"),
        (missing, "tensors of the adapter are missing and stay as they were"),
    ):
        if keys:
            warn_user(
                f"the tensors fit adapter {adapter_name!r} only in part: {len(keys)} {why}: "
                f"{at_most_ten(keys)}"
            )
