"""Class names that a source gives, made fit for a bundle, whose class names are distinct.

Owns: that rule. Does not own: reading names from a source or a file.
"""

from collections import Counter
from collections.abc import Sequence


def distinct(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Adds the index to names that occur more than once, such as the two cranes of ImageNet.

    Args:
        names: in the order of the model's outputs.

    Returns:
        The names, and the sentences that say what was changed (none or one).
    """
    counts = Counter(names)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if not repeated:
        return tuple(names), ()
    made = tuple(f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names))
    shown = ", ".join(repeated[:3]) + (", ..." if len(repeated) > 3 else "")
    return made, (f"class names must be distinct: the index was added to those of several classes ({shown})",)
