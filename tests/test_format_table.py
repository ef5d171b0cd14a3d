"""docs/images.md: its table of formats is what decoding a file of each kind comes to."""

import format_table
import pytest

from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.formats import FORMATS, IMAGE_SUFFIXES, format_of


def test_the_table_is_true() -> None:
    page = format_table.PAGE.read_text()
    shown = page.split(format_table.BEGIN)[1].split(format_table.END)[0]
    assert shown == format_table.table(), "write it anew: python tests/format_table.py"


def test_every_format_of_the_table_has_a_file_of_its_kind() -> None:
    found = {format.name: set[str]() for format in FORMATS}
    for (name, _), data in format_table.files().items():
        recognised = format_of(data)
        if name != "others":
            assert recognised is not None, name
            found[recognised.name].add(name)
    assert found == {format.name: {format.name} for format in FORMATS}


def test_suffixes_belong_to_one_format() -> None:
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)


@pytest.mark.parametrize("kind", [("JPEG XL", "codestream"), ("HEIF", "HEIC"), ("JPEG", "12 bits"), ("TIFF", "planar")])
def test_what_the_extra_reads_says_so_where_it_is_missing(kind: tuple[str, str]) -> None:
    data = next(data for (name, words), data in format_table.files().items() if name == kind[0] and kind[1] in words)
    decode_image(data, format_table.SPEC)
    with (
        format_table.without_extra(),
        pytest.raises(ImageError, match=r"not supported: .*pip install 'mnist_dist\[formats"),
    ):
        decode_image(data, format_table.SPEC)
