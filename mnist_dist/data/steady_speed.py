"""Measures the speed of a job without the slow start of its processes."""

SETTLING = 0.25  # This fraction of the images is not counted, while processes start and queues fill.


class SteadySpeed:
    """Images per second of a job after the first quarter of its images; reports come a few times a second.

    Args:
        images: number of images in the job.
    """

    def __init__(self, images: int = 0) -> None:
        self._settled_images = SETTLING * images
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def note(self, done: int, *, at: float) -> None:
        """Reports that `done` images were finished at time `at`, s."""
        at = max(at, self._last[1])  # Reports arrive out of order and from several clocks.
        if self._first is None and done >= self._settled_images:
            self._first = (done, at)
        self._last = max(self._last, (done, at))

    @property
    def images_per_s(self) -> float | None:
        """Images per second, or None after too few reports."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
