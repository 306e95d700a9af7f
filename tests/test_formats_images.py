"""images.py: picture modes, DICOM windows, inversion and compression, files that are none, real X-rays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
)
from test_data import SHARED, picture

from formats import images


def test_picture_modes(tmp_path):
    ramp = np.linspace(1000, 5000, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert images.read_image(tmp_path / "deep.png").convert("L").getextrema() == (0, 255)
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode, name in (("P", "p.png"), ("RGBA", "a.png"), ("L", "l.jpg"), ("1", "one.png")):
        grey.convert(mode).save(tmp_path / name)
        image = images.read_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (16, 16) and images.check_image(tmp_path / name) == ""


def write_dicom(path: Path, pixels=None, photometric="MONOCHROME2", window=None) -> Path:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    if pixels is not None:
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
        dataset.PixelData = pixels.astype(np.uint16).tobytes()
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_window_stretch_and_inversion(tmp_path):
    pixels = np.linspace(0, 4000, 256).reshape(16, 16)
    grey = np.asarray(images.read_image(write_dicom(tmp_path / "a.dcm", pixels)).convert("L"))
    assert grey[0, 0] == 0 and grey[-1, -1] == 255
    inverted = np.asarray(images.read_image(write_dicom(tmp_path / "b", pixels, "MONOCHROME1")).convert("L"))
    assert np.array_equal(inverted, 255 - grey) or abs(inverted.astype(int) - (255 - grey)).max() <= 1
    window = np.asarray(images.read_image(write_dicom(tmp_path / "c.dcm", pixels, window=(1000, 1000))).convert("L"))
    assert (window[pixels <= 499] == 0).all() and (window[pixels >= 1501] == 255).all()
    assert abs(int(window.flat[np.abs(pixels - 1000).argmin()]) - 128) <= 1


def test_image_errors_are_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.dcm").write_text("no image")
    cut = picture(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-40])
    picture(tmp_path / "one.png", side=1)
    write_dicom(tmp_path / "empty.dcm")
    broken = write_dicom(tmp_path / "short.dcm", np.zeros((16, 16)))
    broken.write_bytes(broken.read_bytes()[:-200])
    cases = {
        "none.png": "No such file",
        "text.png": "unreadable",
        "cut.png": "unreadable",
        "one.png": "only 1 x 1 pixels",
        "text.dcm": "missing DICOM",
        "empty.dcm": "no pixel data",
        "short.dcm": "cannot be decoded",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            images.read_image(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
        assert images.check_image(tmp_path / name) != ""


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real X-rays at {SHARED}")
def test_real_images():
    paths = [p for p in SHARED.rglob("*") if p.suffix in (".png", ".jpg", ".dcm") and p.stat().st_size < 1e6]
    for path in [p for p in paths if p.suffix != ".png"] + paths[:6]:
        assert images.check_image(path) == ""
        low, high = images.read_image(path).convert("L").getextrema()
        assert high - low > 100


def test_jpeg_2000_reads_as_the_uncompressed_file(tmp_path):
    plain = write_dicom(tmp_path / "plain.dcm", np.linspace(0, 4095, 4096).reshape(64, 64), window=(2000, 3000))
    dataset = dcmread(plain)
    dataset.compress(JPEG2000Lossless)
    dataset.save_as(tmp_path / "j2k.dcm")
    assert dcmread(tmp_path / "j2k.dcm").file_meta.TransferSyntaxUID == JPEG2000Lossless
    assert images.check_image(tmp_path / "j2k.dcm") == ""
    assert np.array_equal(images.read_image(plain), images.read_image(tmp_path / "j2k.dcm"))


def test_a_jpeg_with_bytes_after_its_end_is_read(tmp_path):
    path = picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(100))
    assert images.check_image(path) == "" and isinstance(images.read_image(path), Image.Image)


def test_a_cut_off_dicom_is_found_by_its_length(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.linspace(0, 4000, 4096).reshape(64, 64))
    assert images.check_image(path) == ""
    path.write_bytes(path.read_bytes()[:-200])
    assert images.check_image(path) == "unreadable image"


def test_a_deflated_dicom_is_longer_than_its_file(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((64, 64)))
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    assert path.stat().st_size < 64 * 64 * 2 and images.check_image(path) == ""
    assert images.read_image(path).size == (64, 64)
