"""The objects of one picture, with the size of the picture that their boxes refer to."""

from collections.abc import Iterable

from paligemma_jax.tasks.detection import Detection


class Detections(list[Detection]):
    """A list of objects that knows its picture's size.

    size: (width, height) in pixels of the upright picture: as it is seen, after the turn that its EXIF data asks for,
        which may not be as it is stored. Boxes and masks refer to it.
    """

    def __init__(self, found: Iterable[Detection] = (), size: tuple[int, int] = (0, 0)):
        super().__init__(found)
        self.size = size
