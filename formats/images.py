"""Image files: PNG, JPG or DICOM becomes a PIL "RGB" image of 8 bits, or one line that says why not."""

from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian

MIN_SIDE = 8  # pixels; anything smaller is no radiograph but a broken file
BROKEN = (OSError, SyntaxError, Image.DecompressionBombError, InvalidDicomError)  # PIL and pydicom on bad files


def read_image(path: str | Path) -> Image.Image:
    """The image file as PIL "RGB", 8 bit: PNG (8 or 16 bit, palette, alpha dropped), JPG or DICOM.

    More than 8 bits are windowed (DICOM WindowCenter/WindowWidth) or stretched from minimum to maximum; MONOCHROME1 is
    inverted, so that bone is always bright. Raises ValueError with one line naming the file.
    """
    path = Path(path)
    try:
        image = _read_dicom(path) if _is_dicom(path) else _read_picture(path)
    except BROKEN as error:
        raise ValueError(f"image {path}: unreadable ({error}); PNG, JPG and DICOM are known") from error
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"image {path}: only {image.width} x {image.height} pixels, at least {MIN_SIDE} a side needed")
    return image


def check_image(path: Path) -> str:
    """Why an image file cannot be used ("" when it can), from its header and its last bytes.

    MIMIC-CXR has 377,000 images, too many to decode whenever a run starts: damage in the middle of a file shows only
    in read_image, whose error names the file.
    """
    if not path.is_file():
        return "no image file"
    try:
        if _is_dicom(path):
            return _check_dicom(path)
        with Image.open(path) as image:
            if min(image.size) < MIN_SIDE:
                return "image too small"
            if not _has_end(path, image.format):  # cut off, or something else follows
                (image.verify if image.format == "PNG" else image.load)()
    except (ValueError, *BROKEN):
        return "unreadable image"
    return ""


def _has_end(path: Path, kind: str | None) -> bool:
    """Whether the last 64 bytes hold the end marker of a PNG or JPEG; other formats pass."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}.get(kind, b"") in file.read()


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix.lower() == ".dcm" or file.read(132)[128:] == b"DICM"


def _read_picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bit grey; PIL's own conversion clips at 255
            values = np.asarray(image, dtype=np.float64)
            return _to_rgb(values, values.min(), values.max())
        return image.convert("RGBA" if "transparency" in image.info else image.mode).convert("RGB")


def _check_dicom(path: Path) -> str:
    header = dcmread(path, defer_size="1 KB")  # larger values are skipped over
    if "PixelData" not in header:
        return "unreadable image"
    if min(header.get("Rows", 0), header.get("Columns", 0)) < MIN_SIDE:
        return "image too small"
    pixels = header.get_item("PixelData", keep_deferred=True)
    if pixels.length == 0xFFFFFFFF or header.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return ""  # compressed: its length in the file is not given
    return "unreadable image" if pixels.value_tell + pixels.length > path.stat().st_size else ""


def _read_dicom(path: Path) -> Image.Image:
    """One DICOM frame as RGB: rescale, window (or VOI table), invert MONOCHROME1 [DICOM PS3.3 C.7.6.3, C.11.2]."""
    dataset = dcmread(path)
    try:
        pixels = pixel_array(dataset, index=0)
    except (AttributeError, RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"image {path}: DICOM pixel data cannot be decoded ({reason})") from error
    if pixels.ndim == 3:
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    values = apply_modality_lut(pixels, dataset).astype(np.float64)
    center, width, table = dataset.get("WindowCenter"), dataset.get("WindowWidth"), "VOILUTSequence" in dataset
    if center is not None and width is not None and not table:
        center, width = (float(np.atleast_1d(value)[0]) for value in (center, width))
        low, high = center - width / 2, center + width / 2
    else:
        values = apply_voi_lut(pixels if table else values, dataset).astype(np.float64)
        low, high = values.min(), values.max()
    return _to_rgb(values, low, high, invert=dataset.get("PhotometricInterpretation") == "MONOCHROME1")


def _to_rgb(values: np.ndarray, low: float, high: float, invert: bool = False) -> Image.Image:
    """(H, W) grey values, low..high mapped to 0..255 (or 255..0), as RGB."""
    scaled = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    return Image.fromarray(np.round(255 * (1 - scaled if invert else scaled)).astype(np.uint8)).convert("RGB")
