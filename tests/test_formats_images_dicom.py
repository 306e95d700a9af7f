"""images.py on DICOM: its greys against those of pydicom's functions, unusable tags, padding, colour, odd bits."""

import itertools

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, pixel_array
from pydicom.uid import ExplicitVRBigEndian
from test_formats_images import RAMP, grey, refusal, table, write_dicom

from formats import images


def test_dicom_window_stretch_and_inversion(tmp_path):
    pixels = np.linspace(0, 4000, 256).reshape(16, 16)
    plain = grey(write_dicom(tmp_path / "a.dcm", pixels))
    assert plain[0, 0] == 0 and plain[-1, -1] == 255
    inverted = grey(write_dicom(tmp_path / "b", pixels, "MONOCHROME1"))
    assert abs(inverted - (255 - plain)).max() <= 1
    window = grey(write_dicom(tmp_path / "c.dcm", pixels, window=(1000, 1000)))
    assert (window[pixels <= 499] == 0).all() and (window[pixels >= 1501] == 255).all()
    assert abs(int(window.flat[np.abs(pixels - 1000).argmin()]) - 128) <= 1


def pydicom_greys(path, hidden) -> np.ndarray:
    """What pydicom's functions make of the file, their range mapped to 0..255; `hidden` (H, W) is black."""
    dataset = dcmread(path)
    values = apply_modality_lut(pixel_array(dataset).astype(np.int32), dataset)  # (uint8 would overflow)
    low, high = values[~hidden].min(), values[~hidden].max()
    if "VOILUTSequence" in dataset:
        low, high = 0, 4095
        values = np.minimum(values, dataset.VOILUTSequence[0].LUTDescriptor[1] + 2**16 - 2).astype(np.int32)  # wraps
    elif "WindowWidth" in dataset:
        low, high = apply_windowing(np.array([-1e9, 1e9]), dataset)
    shown = np.clip((apply_voi_lut(values, dataset).astype(float) - low) / (high - low), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        shown = 1 - shown
    return np.where(hidden, 0, np.round(255 * shown))


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.filterwarnings("ignore:Applying a VOI LUT on a float", "ignore:overflow encountered in exp")
def test_the_grey_pipeline_is_pydicoms(tmp_path, bits, signed):
    least = -(2 ** (bits - 1)) if signed else 0
    pixels = np.linspace(least, least + 2**bits - 1, 256).round().reshape(16, 16)
    vr, lowest, highest = ("US", "SS")[signed], int(pixels[0, 0]), int(pixels[-1, -1])
    rescale = {"RescaleSlope": "2", "RescaleIntercept": "-1000"}
    modality = [
        ({}, lowest, highest),
        (rescale, 2 * lowest - 1000, 2 * highest - 1000),
        (rescale | {"RescaleSlope": "-1"}, -highest - 1000, -lowest - 1000),
        ({"ModalityLUTSequence": table(4095 * np.linspace(0, 1, 2**bits - 1) ** 0.8, lowest)}, 0, 4095),
    ]
    paddings = [{}, {"PixelPaddingValue": (vr, highest)},
                {"PixelPaddingValue": (vr, int(pixels[0, 9])), "PixelPaddingRangeLimit": (vr, lowest)}]  # fmt: skip
    inverse = {"PresentationLUTShape": "INVERSE"}
    polarities = [("MONOCHROME2", {}), ("MONOCHROME1", inverse), ("MONOCHROME2", inverse)]
    grid = itertools.product(modality, ("", "LUT", "LINEAR", "LINEAR_EXACT", "SIGMOID"))
    for cell, ((tags, low, high), voi) in enumerate(grid):
        if voi == "LUT":
            gamma = np.linspace(0, 1, min(high - low, 2**16 - 1)) ** 0.8
            tags = tags | {"VOILUTSequence": table(4095 * gamma, max(low, -(2**15)), 12)}
        elif voi:
            center, width = (low + high) // 2, (high - low) // 2
            tags = tags | {"WindowCenter": [center, 0], "WindowWidth": [width, 1], "VOILUTFunction": voi}
        for padding, (photometric, shape) in list(itertools.product(paddings, polarities))[cell % 3 :: 3]:
            every = tags | padding | shape
            path = write_dicom(tmp_path / "a.dcm", pixels, photometric, bits=bits, signed=signed, **every)
            ends = [value for _, value in padding.values()] or [2**20]
            hidden = (pixels >= min(ends)) & (pixels <= max(ends))
            expected, shown = pydicom_greys(path, hidden), np.asarray(images.read_image(path).convert("L"))
            assert np.ptp(expected[~hidden]) and abs(shown - expected).max() <= 1, every


def test_what_pydicom_does_not_do_right(tmp_path):
    expected = np.round(255 * RAMP / 4000)
    byte = (np.arange(4001) * 255 // 4000).astype(np.uint8)
    headless = table(byte, bits=8)[0]
    del headless.LUTData
    tables = {
        "8 bits, more than 256 entries": table(byte, bits=8),
        "8 bits, packed two in a word": table(byte, bits=8, data=byte.tobytes() + b"\0"),
        "2**16 entries": table(np.pad(byte, (0, 2**16 - len(byte)), mode="edge"), bits=8),
        "12 bits called 16": table(np.arange(4001) * 4095 // 4000),
        "numbers instead of bytes": table(np.arange(4001), bits=12, data=list(range(4001)), vr="US"),
        "first items without data": [Dataset(), headless, *table(byte, bits=8)],
    }
    for name, sequence in tables.items():
        path = write_dicom(tmp_path / "a.dcm", RAMP, window=(0, 9), VOILUTSequence=sequence)
        assert abs(grey(path) - expected * (4000 / 4095 if "numbers" in name else 1)).max() <= 1, name
    modality = table(np.arange(4001) * 4095 // 4000, bits=12)
    assert abs(grey(write_dicom(tmp_path / "b.dcm", RAMP, ModalityLUTSequence=modality)) - expected).max() <= 1
    # a VOI LUT belongs to modality values, of which the first here is -1000, written as unsigned
    dark, darker = table((byte / 255) ** 2 * 255, 2**16 - 1000, 8), np.round((RAMP / 4000) ** 2 * 255)
    path = write_dicom(tmp_path / "c.dcm", RAMP, RescaleSlope="1", RescaleIntercept="-1000", VOILUTSequence=dark)
    assert abs(grey(path) - darker).max() <= 4
    high = table((byte / 255) ** 2 * 255, 60000, 8)
    path = write_dicom(tmp_path / "c.dcm", RAMP + 60000, bits=16, VOILUTSequence=high)
    assert abs(grey(path) - darker).max() <= 4  # and here it is as large as that
    cut = table(byte, bits=8, data=byte[:-9].tobytes())
    assert "reshape" in refusal(write_dicom(tmp_path / "cut.dcm", RAMP, VOILUTSequence=cut))
    big = table(byte, bits=8, data=byte.astype(">u2").tobytes())
    path = write_dicom(tmp_path / "d.dcm", RAMP, syntax=ExplicitVRBigEndian, VOILUTSequence=big)
    assert abs(grey(path) - expected).max() <= 1


UNUSABLE = {
    "NaN": {"WindowCenter": "NaN", "WindowWidth": "NaN"},
    "NaN in the middle": {"WindowCenter": "NaN", "WindowWidth": "500"},
    "infinite": {"WindowCenter": "2000", "WindowWidth": "inf"},
    "no width": {"WindowCenter": "2000", "WindowWidth": "0"},
    "a width of one value": {"WindowCenter": "2000", "WindowWidth": "1"},
    "negative": {"WindowCenter": "2000", "WindowWidth": "-100", "VOILUTFunction": "SIGMOID"},
    "above all pixels": {"WindowCenter": "30000", "WindowWidth": "100"},
    "below all pixels": {"WindowCenter": "-30000", "WindowWidth": "100", "VOILUTFunction": "SIGMOID"},
    "empty window": {"WindowCenter": "", "WindowWidth": None},
    "half a window": {"WindowCenter": "2000"},
    "empty rescale": {"RescaleSlope": None, "RescaleIntercept": ""},
    "no slope": {"RescaleSlope": "0", "RescaleIntercept": "5"},
    "half a rescale": {"RescaleSlope": "NaN", "RescaleIntercept": "5"},
    "empty tables": {"VOILUTSequence": [], "ModalityLUTSequence": [Dataset()]},
    "a table of one grey": {"VOILUTSequence": table([9] * 4001)},
    "a table of zeros": {"VOILUTSequence": table([0] * 4001)},
    "padding without a value": {"PixelPaddingValue": ("US", None), "PixelPaddingRangeLimit": ("US", None)},
    "padding everywhere": {"PixelPaddingValue": ("US", 0), "PixelPaddingRangeLimit": ("US", 4095)},
    "an unknown shape": {"PresentationLUTShape": "LIN OD"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_tag_that_cannot_be_used_counts_as_absent(tmp_path, name):
    assert np.array_equal(grey(write_dicom(tmp_path / "a.dcm", RAMP, **UNUSABLE[name])), np.round(255 * RAMP / 4000))


def test_padding_neither_stretches_nor_shines(tmp_path):
    for padding, photometric in itertools.product((0, 4095), ("MONOCHROME1", "MONOCHROME2")):
        pixels = np.where(RAMP < 500, padding, RAMP.clip(1000, 2000))
        path = write_dicom(tmp_path / "a.dcm", pixels, photometric, PixelPaddingValue=("US", padding))
        shown = grey(path)
        assert (shown[RAMP < 500] == 0).all() and shown[RAMP > 500].min() == 0 and shown.max() == 255
    signed = np.where(RAMP < 500, -2000, RAMP)  # in many files the padding of signed pixels is written as unsigned
    shown = grey(write_dicom(tmp_path / "b.dcm", signed, bits=16, signed=1, PixelPaddingValue=("US", 2**16 - 2000)))
    assert (shown[RAMP < 510] == 0).all() and shown[2, 8] < 20


def test_colour_is_right_or_refused(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    path = write_dicom(tmp_path / "rgb.dcm", colour, "RGB", bits=8)
    assert np.array_equal(images.read_image(path), colour) and images.check_image(path) == ""
    planes = dcmread(path)
    planes.PlanarConfiguration, planes.PixelData = 1, colour.transpose(2, 0, 1).astype(np.uint8).tobytes()
    planes.save_as(tmp_path / "planes.dcm")
    assert np.array_equal(images.read_image(tmp_path / "planes.dcm"), colour)
    ycc = np.asarray(Image.fromarray(colour.astype(np.uint8)).convert("YCbCr")).astype(int)
    shown = np.asarray(images.read_image(write_dicom(tmp_path / "ybr.dcm", ycc, "YBR_FULL", bits=8))).astype(int)
    assert np.abs(shown - colour).max() <= 4
    refused = [
        (colour * 257, "RGB", {"bits": 16}), (colour, "YBR_FULL", {"bits": 16}), (colour // 4, "RGB", {"bits": 6}),
        (colour // 2, "RGB", {"bits": 8, "signed": 1}), (colour, "HSV", {"bits": 8}),
        (colour, "YBR_PARTIAL_422", {"bits": 8}), (RAMP, "PALETTE COLOR", {}), (RAMP, "RGB", {}),
    ]  # fmt: skip
    for pixels, photometric, changes in refused:
        assert f"{photometric} of" in refusal(write_dicom(tmp_path / "a.dcm", pixels, photometric, **changes))


def test_bits_beside_those_stored(tmp_path):
    pixels = RAMP.astype(np.uint16)
    plain = grey(write_dicom(tmp_path / "a.dcm", pixels))
    assert np.array_equal(grey(write_dicom(tmp_path / "b.dcm", pixels | 0xF000)), plain)  # an overlay in the upper bits
    assert "'17' is invalid" in refusal(write_dicom(tmp_path / "c.dcm", pixels, BitsStored=17, HighBit=16))
    assert "high bit 15 with 12" in refusal(write_dicom(tmp_path / "c.dcm", pixels << 4, HighBit=15))


@pytest.mark.parametrize(("width", "same"), [(b"4000,0", b"4000.0"), (b"abcdef", None), (b"4 0 00", None)])
def test_a_number_that_is_none_counts_as_absent_and_a_decimal_comma_as_a_point(tmp_path, width, same):
    def film(value: bytes | None) -> np.ndarray:
        tags = {"WindowCenter": "2048", "WindowWidth": "4000.0"} if value else {}
        path = write_dicom(tmp_path / "d.dcm", RAMP, **tags)
        path.write_bytes(path.read_bytes().replace(b"4000.0", value or b""))
        return grey(path)

    assert (film(width) == film(same)).all()
