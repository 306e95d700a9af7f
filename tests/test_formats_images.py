"""images.py: pictures of all depths, compressed DICOMs, files that are none or too large, real X-rays."""

import io
import itertools
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from test_data import SHARED, picture

from formats import images

RAMP = np.linspace(0, 4000, 256).reshape(16, 16).round()


def write_dicom(path: Path, pixels=None, photometric="MONOCHROME2", window=None, bits=12, signed=0,
                syntax=ExplicitVRLittleEndian, **tags):  # fmt: skip
    """A DICOM file of `pixels`, (H, W) or (H, W, 3), with tags by keyword: values, or pairs (VR, value)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    if pixels is not None:
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (1, 3)[pixels.ndim == 3], photometric
        if pixels.ndim == 3:
            dataset.PlanarConfiguration = 0
        allocated = 8 if bits <= 8 else 16
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, bits, bits - 1
        dataset.PixelRepresentation = signed
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        dataset.add_new("PixelData", "OW", pixels.astype(f"{order}{'ui'[signed]}{allocated // 8}").tobytes())
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
    for keyword, value in tags.items():
        if isinstance(value, tuple):
            dataset.add_new(keyword, *value)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def table(entries, first=0, bits=16, data=None, vr="OW"):
    """A LUT sequence of one item; `data` replaces the entries' bytes."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 2**16, first, bits])
    item.add_new("LUTData", vr, np.asarray(entries, "<u2").tobytes() if data is None else data)
    return [item]


def grey(path) -> np.ndarray:
    """The greys (H, W) that read_image makes of a file that check_image passes."""
    assert images.check_image(path) == ""
    return np.asarray(images.read_image(path).convert("L")).astype(int)


def refusal(path) -> str:
    """The one line with which read_image refuses a file; check_image refuses it as well."""
    with pytest.raises(ValueError, match=".") as error:
        images.read_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert images.check_image(path)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.filterwarnings("error")
def test_picture_modes(tmp_path):
    ramp = np.linspace(1000, 5000, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert images.read_image(tmp_path / "deep.png").convert("L").getextrema() == (0, 255)
    flat = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode, name in (("P", "p.png"), ("RGBA", "a.png"), ("L", "l.jpg"), ("1", "one.png"), ("CMYK", "c.jpg")):
        flat.convert(mode).save(tmp_path / name)
        image = images.read_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (16, 16) and images.check_image(tmp_path / name) == ""
    assert np.ptp(grey(tmp_path / "one.png")) == 255
    flat.convert("P").save(tmp_path / "clear.png", transparency=bytes(range(256)))  # PIL would warn
    assert np.array_equal(grey(tmp_path / "clear.png"), flat)


@pytest.mark.filterwarnings("error")
def test_deep_pictures_are_stretched(tmp_path):
    Image.fromarray(np.full((16, 16), 999, np.uint16)).save(tmp_path / "even.png")
    assert (grey(tmp_path / "even.png") == 0).all()
    expected = np.round(255 * RAMP / 4000)
    for dtype, scale in ((np.float32, 1e-3), (np.float32, 1e5), (np.int32, 1000)):
        Image.fromarray((RAMP * scale).astype(dtype)).save(tmp_path / "a.tif")
        assert abs(grey(tmp_path / "a.tif") - expected).max() <= 1
    holes = RAMP.astype(np.float32)
    holes[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(holes).save(tmp_path / "holes.tif")
    assert (grey(tmp_path / "holes.tif")[0, :3] == 0).all()
    assert abs(grey(tmp_path / "holes.tif") - expected).max() <= 3  # the three lowest values are gone
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "white.tif", tiffinfo={262: 0})  # WhiteIsZero
    assert np.array_equal(grey(tmp_path / "white.tif"), 255 - expected)


def deep_png(path, colour_type, channels):
    """A 16 x 16 PNG of 16 bits a channel, which PIL reads but cannot write."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 16, 16, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + np.full(16 * channels, 4095, ">u2").tobytes() for _ in range(16))
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def test_pictures_that_would_be_clipped_or_dropped_are_refused(tmp_path, monkeypatch):
    for colour_type, channels in ((2, 3), (4, 2), (6, 4)):  # RGB, grey + alpha, RGB + alpha
        assert "16 bits" in refusal(deep_png(tmp_path / f"{channels}.png", colour_type, channels))
    flat = Image.new("L", (16, 16))
    for name in ("a.gif", "a.tif", "a.png"):
        flat.save(tmp_path / name, save_all=True, append_images=[Image.new("L", (16, 16), 9)])
        assert "several frames" in refusal(tmp_path / name)
    flat.save(tmp_path / "program.eps")  # would start Ghostscript
    assert "cannot identify" in refusal(tmp_path / "program.eps")
    Image.new("RGB", (30, 30)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert "decompression bomb" in refusal(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 899)
    assert "image too large: 30 x 30" in refusal(tmp_path / "big.png")
    assert images.check_image(tmp_path / "big.png") == "image too large"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    for orientation in range(1, 9):
        quarters = Image.fromarray(np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 16, 0), 24, 1))
        exif = Image.Exif()
        exif[0x0112] = orientation
        quarters.save(tmp_path / f"a{suffix}", exif=exif, quality=95)
        with Image.open(tmp_path / f"a{suffix}") as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored).convert("L")).astype(int)
        assert expected.shape == ((32, 48) if orientation < 5 else (48, 32))
        assert np.array_equal(grey(tmp_path / f"a{suffix}"), expected)


# --------------------------------------------------------------------------------------- files that cannot be read


def test_image_errors_are_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.dcm").write_text("no image")
    cut = picture(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-40])
    picture(tmp_path / "one.png", side=1)
    write_dicom(tmp_path / "empty.dcm")
    broken = write_dicom(tmp_path / "short.dcm", np.zeros((16, 16)))
    broken.write_bytes(broken.read_bytes()[:-200])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    os.mkfifo(tmp_path / "pipe.dcm")
    cases = {
        "none.png": "No such file",
        "text.png": "cannot identify",
        "cut.png": "unreadable",
        "one.png": "only 1 x 1 pixels",
        "text.dcm": "missing DICOM",
        "empty.dcm": "no pixel data",
        "short.dcm": "pixel data is cut off",
        "folder.png": "not a regular file",
        "pipe.dcm": "not a regular file",
        "circle.png": "symbolic links",
        "long" * 99 + ".png": "too long",
    }
    for name, message in cases.items():
        assert message in refusal(tmp_path / name)


def test_what_needs_too_much_memory_is_refused_by_its_header(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((64, 64)), syntax=DeflatedExplicitVRLittleEndian)
    frames = write_dicom(tmp_path / "frames.dcm", np.zeros((64, 64)), NumberOfFrames=2)
    dataset = dcmread(write_dicom(tmp_path / "b.dcm", np.zeros((64, 64))))
    dataset.compress(RLELossless)
    dataset.Rows = dataset.Columns = 65535
    dataset.save_as(tmp_path / "b.dcm")
    assert "image too large: 65535 x 65535" in refusal(tmp_path / "b.dcm")
    assert "several frames" in refusal(frames)
    enhanced = write_dicom(tmp_path / "enhanced.dcm", np.zeros((64, 64)), SharedFunctionalGroupsSequence=[Dataset()])
    assert "several frames" in refusal(enhanced)
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    assert "image too large: over 8,000 bytes" in refusal(path)


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real X-rays at {SHARED}")
def test_real_images():
    paths = [p for p in SHARED.rglob("*") if p.suffix in (".png", ".jpg", ".dcm") and p.stat().st_size < 1e6]
    for path in [p for p in paths if p.suffix != ".png"][:20] + paths[:6] + [*SHARED.rglob("*.dcm")]:
        assert np.ptp(grey(path)) > 100


def test_jpeg_2000_reads_as_the_uncompressed_file(tmp_path):
    plain = write_dicom(tmp_path / "plain.dcm", np.linspace(0, 4095, 4096).reshape(64, 64), window=(2000, 3000))
    dataset = dcmread(plain)
    dataset.compress(JPEG2000Lossless)
    dataset.save_as(tmp_path / "j2k.dcm")
    assert dcmread(tmp_path / "j2k.dcm").file_meta.TransferSyntaxUID == JPEG2000Lossless
    assert np.array_equal(grey(plain), grey(tmp_path / "j2k.dcm"))


def test_a_jpeg_with_bytes_after_its_end_is_read(tmp_path):
    path = picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(100))
    assert images.check_image(path) == "" and isinstance(images.read_image(path), Image.Image)


def test_a_cut_off_dicom_is_found_by_its_length(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.linspace(0, 4000, 4096).reshape(64, 64))
    assert images.check_image(path) == ""
    path.write_bytes(path.read_bytes()[:-200])
    assert images.check_image(path) == "unreadable image"
    assert "cut off" in refusal(write_dicom(tmp_path / "b.dcm", RAMP, Rows=17))  # fewer pixels than the header says


def test_a_deflated_dicom_is_longer_than_its_file(tmp_path):
    pixels = RAMP.repeat(8, 0).repeat(8, 1)
    path = write_dicom(tmp_path / "a.dcm", pixels, syntax=DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < pixels.size
    assert np.array_equal(grey(path), grey(write_dicom(tmp_path / "b.dcm", pixels)))


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """The file with some bytes changed, cut off, emptied or put in."""
    data, place = bytearray(seed), rng.randrange(len(seed))
    kind = rng.choice(("flip", "flip", "head", "cut", "empty", "insert"))
    if kind in ("flip", "head"):
        for _ in range(rng.choice((1, 4, 30))):
            data[rng.randrange(len(data) if kind == "flip" else min(len(data), 600))] = rng.randrange(256)
    elif kind == "cut":
        del data[place:]
    else:
        data[place : place + 8 * (kind == "empty")] = bytes(rng.choice((2, 8, 50)))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    exif, rng = Image.Exif(), random.Random(0)
    exif[0x0112] = 6
    flat = Image.fromarray((RAMP // 16).astype(np.uint8).repeat(4, 0).repeat(4, 1))
    flat.save(tmp_path / "a.png", exif=exif)
    flat.save(tmp_path / "b.jpg", exif=exif)
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-5", "PixelPaddingValue": ("US", 0), "VOILUTFunction": "SIGMOID",
            "PresentationLUTShape": "INVERSE", "VOILUTSequence": table(np.arange(4096), bits=12)}  # fmt: skip
    dicom = write_dicom(tmp_path / "c.dcm", RAMP, window=(2000, 3000), **tags)
    write_dicom(tmp_path / "d.dcm", RAMP, syntax=DeflatedExplicitVRLittleEndian)
    files = [(path.suffix, mutated(path.read_bytes(), rng)) for path in sorted(tmp_path.iterdir()) for _ in range(40)]
    wrong = [("LO", "words"), ("OB", b"\1\2\3"), ("DS", "NaN"), ("FD", float("inf")), ("US", [7, 8]), ("SQ", [])]
    for keyword, (vr, value) in itertools.product([*tags, "Rows", "BitsStored", "PixelData", "WindowWidth"], wrong):
        dataset = dcmread(dicom)
        dataset.add_new(keyword, vr, value)
        file = io.BytesIO()
        dataset.save_as(file)
        files.append((".dcm", file.getvalue()))
    outcomes = []
    for number, (suffix, data) in enumerate(files):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(data)
        reason = images.check_image(path)
        try:
            outcomes.append(images.read_image(path).mode)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes.append("refused" if reason else "found when decoded")
    assert {"RGB", "refused", "found when decoded"} == set(outcomes)
