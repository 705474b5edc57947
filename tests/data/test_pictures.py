"""Pictures of every kind become RGB images; a broken one is named, and a huge one is not decoded."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restnet_hf import PictureError
from restnet_hf.data.pictures import is_picture, open_picture, split_pictures


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encoded(kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def huge_png(width, height):
    """A few bytes that claim to be a picture of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


FORMS = {
    "PIL": lambda path: Image.fromarray(PIXELS),
    "path": lambda path: path,
    "text": str,
    "bytes": lambda path: path.read_bytes(),
    "of datasets": lambda path: {"bytes": path.read_bytes(), "path": None},
    "file of datasets": lambda path: {"bytes": None, "path": str(path)},
    "array": lambda path: PIXELS,
    "channels first": lambda path: PIXELS.transpose(2, 0, 1),
    "tensor": lambda path: torch.from_numpy(PIXELS).permute(2, 0, 1),
    "larger numbers": lambda path: PIXELS.astype(np.int64),
    "lists": lambda path: PIXELS.tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    picture = FORMS[form](tmp_path / "a.png")
    assert is_picture(picture) or form == "lists"
    assert np.array_equal(np.asarray(open_picture(picture)), PIXELS)


def test_grey_arrays_have_one_channel():
    grey = PIXELS[..., 0]
    expected = np.repeat(grey[..., None], 3, -1)
    for picture in (grey, grey[..., None], grey[None], torch.from_numpy(grey)):
        assert np.array_equal(np.asarray(open_picture(picture)), expected)
    assert np.asarray(open_picture(np.array([[False, True]])))[0, :, 0].tolist() == [0, 255]


def test_arrays_hold_one_or_several():
    assert len(split_pictures(PIXELS)) == 1 and len(split_pictures(np.stack([PIXELS] * 4))) == 4
    assert split_pictures(np.zeros((3, 8, 8), np.float32)).shape == (1, 3, 8, 8)
    assert len(split_pictures(np.zeros((5, 8, 8), np.uint8))) == 5


def test_turned_upright_as_by_datasets(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert open_picture(tmp_path / "a.png").size == (6, 9)
    assert open_picture(Image.open(tmp_path / "a.png")).size == (6, 9)


BROKEN = {
    "empty": b"",
    "text": b"not a picture",
    "truncated png": encoded()[:60],
    "truncated jpeg": encoded("JPEG")[:-40],
    "damaged": encoded()[:45] + bytes(20) + encoded()[65:],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(kind, tmp_path):
    path = tmp_path / "cat 3.png"
    path.write_bytes(BROKEN[kind])
    for picture in (path, {"bytes": BROKEN[kind], "path": str(path)}):
        with pytest.raises(PictureError, match=r"cat 3\.png cannot be read: .*on_error='skip'"):
            open_picture(picture)
    with pytest.raises(PictureError, match="picture 7 cannot be read"):
        open_picture(BROKEN[kind], "picture 7")


@pytest.mark.parametrize("size", [(20000, 10000), (9500, 9500), (2**31 - 1, 2**31 - 1)])
def test_a_huge_picture_is_not_decoded(size, tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(huge_png(*size))
    with pytest.raises(PictureError, match=r"huge\.png (is too large: .*pixels|cannot be read)"):
        open_picture(path)


def test_missing_files_and_other_things(tmp_path):
    with pytest.raises(PictureError, match=r"no\.png cannot be read: .*No such file"):
        open_picture(tmp_path / "no.png")
    with pytest.raises(PictureError, match="cannot be read: it has neither"):
        open_picture({"bytes": None, "path": None})
    with pytest.raises(PictureError, match="values from 0 to 300"):
        open_picture(np.array([[0, 300]]))
    for wrong in (3, np.zeros((3, 4, 4), np.float32), np.zeros((2, 2, 2, 2), np.uint8), np.zeros((0, 3), np.uint8)):
        with pytest.raises(TypeError, match="a picture is"):
            open_picture(wrong, "picture 1")
    assert not is_picture(Path) and not is_picture(None)
