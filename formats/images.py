"""Image files: a PNG, JPG or DICOM (or TIFF, ...) becomes a PIL "RGB" image of 8 bits, or one line says why not."""

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pydicom import Dataset, dcmread, errors, filereader, pixels
from pydicom.misc import is_dicom
from pydicom.pixels.decoders.base import DecodeRunner

from formats.files import require_regular

MIN_SIDE = 8  # pixels; anything smaller is no radiograph but a broken file
MAX_PIXELS = 2**26  # more than any film has; looked for in the header, since 1 MB of a file can inflate to many GB
PICTURES = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")  # of PIL's formats some start programs
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # of a DICOM: what is decoded to RGB
BROKEN = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
          SyntaxError, struct.error, zlib.error, Image.DecompressionBombError, errors.InvalidDicomError,
          errors.BytesLengthException)  # fmt: skip  # PIL and pydicom on bad files


def read_image(path: str | Path) -> Image.Image:
    """The image file as PIL "RGB", 8 bit: turned as its EXIF orientation says, alpha dropped, grey of more than 8 bits
    stretched from minimum to maximum, a DICOM shown as its tags say. Raises ValueError with one line naming the file.
    """
    try:
        with _open(Path(path)) as image:
            if isinstance(image, Dataset):
                return _render(pixels.pixel_array(image, index=0), image)
            white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 and 32 bit grey; PIL's own conversion clips at 255
                return _to_rgb(np.asarray(image, dtype=np.float64), invert=white_is_zero)
            return image.convert("RGBA" if "transparency" in image.info else image.mode).convert("RGB")
    except BROKEN as error:
        raise ValueError(" ".join(f"image {path}: unreadable ({error})".split())) from error


def check_image(path: Path) -> str:
    """Why an image file cannot be used ("" when it can), by its header and last bytes: MIMIC-CXR's 377,000 images are
    too many to decode whenever a run starts. Damage in the middle shows only in read_image, whose error names the file.
    """
    try:
        if not path.is_file():
            return "no image file"
        with _open(path) as image, open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 64))
            ends = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
            if ends.get(getattr(image, "format", ""), b"") not in file.read():  # cut off, or something else follows
                (image.verify if image.format == "PNG" else image.load)()
    except BROKEN as error:
        reason = str(error).partition(":")[0]
        return reason if reason.startswith("image ") else "unreadable image"
    return ""


def _open(path: Path) -> Image.Image | Dataset:
    """The picture or DICOM, not yet decoded; raises one of BROKEN where its header says that it cannot be read."""
    require_regular(path)
    if path.suffix.lower() == ".dcm" or is_dicom(path):
        image = _open_dicom(path)
        width, height = image.Columns, image.Rows
    else:
        image = Image.open(path, formats=PICTURES)
        width, height = image.size
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's MPO: the photo, then its preview
            raise ValueError("image of several frames")
        if image.mode[0] not in "IF" and re.search(";16[BLN]", str(image.tile[:1])):  # PIL drops the lower bits
            raise ValueError("colour or alpha of 16 bits")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"image too small: only {width} x {height} pixels, at least {MIN_SIDE} a side needed")
    if width * height > MAX_PIXELS:
        raise ValueError(f"image too large: {width} x {height} pixels, at most {MAX_PIXELS:,} allowed")
    return image


def _open_dicom(path: Path) -> Dataset:
    """As _open: whatever needs no pixels is tried on blank ones; long values are read when they are asked for."""
    meta = filereader.read_file_meta_info(path)
    syntax = meta.TransferSyntaxUID
    decoder, runner = pixels.get_decoder(syntax), DecodeRunner(syntax)
    if syntax.is_deflated:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(path.read_bytes()[144 + meta.FileMetaInformationGroupLength :], 4 * MAX_PIXELS)
        if inflater.unconsumed_tail:
            raise ValueError(f"image too large: over {4 * MAX_PIXELS:,} bytes")
    dataset = dcmread(path, defer_size="1 KB")
    if "PixelData" not in dataset:
        raise ValueError("no pixel data")
    runner.set_options(**pixels.as_pixel_options(dataset), pixel_keyword="PixelData")
    runner.set_source(BytesIO())
    runner.validate()
    if runner.number_of_frames > 1 or "SharedFunctionalGroupsSequence" in dataset:  # there each frame has its tags
        raise ValueError("image of several frames")
    if dataset.get("HighBit", runner.bits_stored - 1) != runner.bits_stored - 1:
        raise ValueError(f"high bit {dataset.HighBit} with {runner.bits_stored} bits stored")
    data = dataset.get_item("PixelData", keep_deferred=True)
    room = 2**32 if syntax.is_deflated else path.stat().st_size - data.value_tell
    if not (decoder.is_encapsulated or runner.frame_length() <= data.length <= room) or not decoder.is_available:
        raise ValueError(f"pixel data is cut off or there is no decoder for {syntax.name}")
    _render(np.zeros((MIN_SIDE, MIN_SIDE, 3)[: 1 + min(runner.samples_per_pixel, 2)], runner.pixel_dtype), dataset)
    return dataset


def _render(stored: np.ndarray, dataset: Dataset) -> Image.Image:
    """Stored values, (H, W) or (H, W, 3), as RGB by the DICOM's tags, in the order of PS3.3 C.7.6.3, C.8.11, C.11.1-2.

    A tag that cannot be used (empty, NaN, a window of no width or that shows a single grey) counts as absent.
    """
    kind = dataset.PhotometricInterpretation
    if kind in COLOURS and stored.ndim == 3 and stored.dtype == np.uint8 and dataset.BitsStored == 8:
        return Image.fromarray(stored)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"{kind} of {dataset.BitsStored} bits is not known")
    values = stored.astype(np.float64)
    padding = [_number(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    padding = [end - 2**16 if end >= 2**15 and stored.dtype.kind == "i" else end for end in padding]
    hidden = (values >= np.fmin(*padding)) & (values <= np.fmax(*padding))
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if table := _look_up(values, dataset, "ModalityLUTSequence"):
        values = table[0]
    elif slope and np.isfinite(slope + intercept):
        values = values * slope + intercept
    grey, center, width = None, _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    function = str(dataset.get("VOILUTFunction")).upper()
    if function not in ("LINEAR_EXACT", "SIGMOID"):  # LINEAR [C.11.2.1.2.1]
        center, width = center - 0.5, width - 1
    if table := _look_up(values, dataset, "VOILUTSequence"):
        grey = table[0] / max(table[1], 1)
    elif width > 0 and np.isfinite(center + width):
        grey = (values - center) / width
        grey = (1 + np.tanh(2 * grey)) / 2 if function == "SIGMOID" else np.clip(grey + 0.5, 0, 1)
    invert = kind == "MONOCHROME1" or str(dataset.get("PresentationLUTShape")).strip().upper() == "INVERSE"
    return _to_rgb(values, hidden, grey, invert)


def _number(dataset: Dataset, keyword: str) -> float:
    """An element's first value, NaN where it is absent, empty or no number; a decimal comma is read as a point."""
    first = str(np.atleast_1d(dataset.get(keyword))[0]).replace(",", ".")
    return float(first) if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", first) else float("nan")


def _look_up(values: np.ndarray, dataset: Dataset, keyword: str) -> tuple[np.ndarray, int] | None:
    """(values through a sequence's first table with data, the most that its entries' bits hold), None without one.

    pydicom's own functions index 8-bit tables modulo 256 and refuse 12 bits; these are counted, as files miscall them.
    """
    items = [item for item in dataset.get(keyword) or () if item.get("LUTData")]
    items = [item for item in items if len(np.atleast_1d(item.get("LUTDescriptor"))) == 3]
    if not items:
        return None
    (count, first, _), data = items[0].LUTDescriptor, items[0].LUTData
    count = count or 2**16
    if isinstance(data, bytes):
        wide = "<u2" if dataset.original_encoding[1] else ">u2"
        data = np.frombuffer(data, wide if len(data) >= 2 * count else np.uint8)
    table = np.atleast_1d(data)[:count].astype(int).reshape(count) & 0xFFFF
    first -= 2**16 if first >= 2**15 and values.min() < 0 else 0  # a negative one, written as unsigned
    return table[np.clip(np.rint(values - first), 0, count - 1).astype(int)], 2 ** int(table.max()).bit_length() - 1


def _to_rgb(values: np.ndarray, hidden=False, grey: np.ndarray | None = None, invert: bool = False) -> Image.Image:
    """(H, W) values as RGB by their greys, 0 to 1, or stretched where those show nothing; what is hidden is black."""
    hidden = ~np.isfinite(values) | (hidden & ~np.all(hidden))
    shown = values[~hidden]
    if grey is None or not np.ptp(np.round(255 * grey[~hidden])):
        grey = np.clip((values - shown.min()) / (np.ptp(shown) or 1), 0, 1)
    grey = np.where(hidden, 0, np.round(255 * (1 - grey if invert else grey)))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
