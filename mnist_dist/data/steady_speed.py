"""How fast work goes once it is under way: without the start of its processes."""

SETTLING = 0.25  # of the images, that do not count: processes start, queues fill


class SteadySpeed:
    """Images/s of a job after the first quarter of its images, told how far it is a few times a second.

    Args:
        images: that it scores.
    """

    def __init__(self, images: int = 0) -> None:
        self._settled_images = SETTLING * images
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def note(self, done: int, *, at: float) -> None:
        """So many images are done at a time, s."""
        at = max(at, self._last[1])  # told out of order, and by several clocks
        if self._first is None and done >= self._settled_images:
            self._first = (done, at)
        self._last = max(self._last, (done, at))

    @property
    def images_per_s(self) -> float | None:
        """None where it was told too seldom."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
