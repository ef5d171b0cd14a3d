"""Real files of every kind, for `fuzz`: a photograph in every format, and archives of a few images.

Owns: encoding one small file of each kind that something here can write. Does not own: changing them (`mutations`).
"""

import gzip
import io
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import heics
import imagecodecs
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import tifffile
from corpus import encoded, tar_of
from mutations import COMPRESSIONS, PNG_MAGIC, png_chunk
from PIL import Image
from sklearn.datasets import load_sample_image
from tiffs import Tiff, tiff

Array = npt.NDArray[Any]

# --- images ----------------------------------------------------------------------------------------------------------


def images() -> dict[str, bytes]:
    """A photograph in every format, depth and packing that something here can write; the name begins with the kind."""
    photo = Image.fromarray(load_sample_image("flower.jpg")[60:380, 120:540])
    small = photo.resize((53, 37))
    return {
        **_jpegs(photo, "large"),
        **_jpegs(small, "small"),
        **_rare_jpegs(np.asarray(small)),
        **_pngs(small),
        **_gifs(small),
        **_bmps(np.asarray(small)),
        **_pillow_tiffs(small),
        **_tiffs(np.asarray(small)),
        **_deep_tiffs(np.asarray(small)[..., 1]),
        **_pnms(np.asarray(small)),
        **_modern(small),
        **{f"heic {name}": data for name, data in vars(heics).items() if isinstance(data, bytes) and len(data) > 200},
    }


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "a flower"
    return exif


def _jpegs(rgb: Image.Image, size: str) -> dict[str, bytes]:
    pixels = np.ascontiguousarray(rgb)
    options: dict[str, dict[str, Any]] = {
        "progressive": {"progressive": True},
        "optimised": {"optimize": True, "quality": 95},
        "restart_blocks": {"restart_marker_blocks": 3},
        "restart_rows": {"restart_marker_rows": 1, "progressive": True},
        "exif": {"exif": _exif(6)},
        "exif_behind_icc": {"exif": _exif(5), "icc_profile": bytes(range(256)) * 300, "comment": b"c" * 300},
        "rgb_inside": {"keep_rgb": True},
    }
    files = {f"jpeg {name}": encoded(rgb, "JPEG", **values) for name, values in options.items()}
    for mode in ("L", "CMYK"):
        files[f"jpeg {mode}"] = encoded(rgb.convert(mode), "JPEG")
        files[f"jpeg {mode} progressive"] = encoded(rgb.convert(mode), "JPEG", progressive=True)
    for sampling in ("444", "422", "420", "440", "411"):
        files[f"jpeg {sampling}"] = simplejpeg.encode_jpeg(pixels, 85, "RGB", sampling)
    if shutil.which("jpegtran"):
        for mode in ("arithmetic", "progressive -arithmetic", "rotate 90"):
            command = ["jpegtran", *f"-{mode}".split()]
            files[f"jpeg {mode}"] = subprocess.run(
                command, input=files["jpeg 411"], stdout=subprocess.PIPE, check=True
            ).stdout
    return {f"{name} {size}": data for name, data in files.items()}


def _rare_jpegs(pixels: Array) -> dict[str, bytes]:
    deep = pixels.astype(np.uint16) * 16 + 7
    files = {
        "jpeg lossless": imagecodecs.jpeg8_encode(pixels, lossless=True),
        "jpeg lossless grey": imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels[..., 0]), lossless=True),
        "jpeg lossless 16": imagecodecs.ljpeg_encode(np.ascontiguousarray(deep[..., 1]) * 16, bitspersample=16),
        "jpeg 12": imagecodecs.jpeg8_encode(deep, bitspersample=12),
        "jpeg 12 grey": imagecodecs.jpeg8_encode(np.ascontiguousarray(deep[..., 1]), bitspersample=12),
    }
    return {name: bytes(data) for name, data in files.items()}


def _pngs(rgb: Image.Image) -> dict[str, bytes]:
    files = {}
    for (colour, channels), depth in [(kind, depth) for kind in _PNG_COLOURS.items() for depth in (1, 2, 4, 8, 16)]:
        if depth in _PNG_DEPTHS[colour]:
            for is_interlaced in (False, True):
                for has_key in (False, True) if colour in (0, 2, 3) else (False,):
                    name = f"png {colour} {depth}{' interlaced' * is_interlaced}{' key' * has_key}"
                    files[name] = png(np.asarray(rgb), colour, channels, depth, is_interlaced, has_key)
    frames = [rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rgb.rotate(180)]
    files["png animated"] = encoded(rgb, "PNG", save_all=True, append_images=frames)
    files["png exif"] = encoded(rgb, "PNG", exif=_exif(8), icc_profile=b"icc " * 99)
    return files


_PNG_COLOURS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(rgb: Array, colour: int, channels: int, depth: int, is_interlaced: bool, has_key: bool) -> bytes:
    """A PNG of any colour type and depth. Source: PNG, third edition, sections 8 and 11."""
    height, width = rgb.shape[:2]
    samples: Array = np.concatenate([rgb, rgb[..., 1:2]], axis=-1)[..., :channels].astype(np.uint32)
    samples = samples * 257 if depth == 16 else samples >> (8 - depth)
    passes = _ADAM7 if is_interlaced else ((0, 0, 1, 1),)
    rows = b"".join(_png_rows(samples[y::dy, x::dx], depth) for x, y, dx, dy in passes)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, is_interlaced))]
    if colour == 3:
        chunks.append((b"PLTE", bytes(range(256))[: 2**depth] * 3))
    if has_key:
        key = samples[0, 0].astype(">u2").tobytes()
        chunks.append((b"tRNS", bytes(range(2**depth)) if colour == 3 else key))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return PNG_MAGIC + b"".join(png_chunk(kind, data) for kind, data in chunks)


def _png_rows(samples: Array, depth: int) -> bytes:
    height, width = samples.shape[:2]
    if not width:
        return b""
    if depth >= 8:
        packed = samples.astype(">u2" if depth == 16 else "u1").reshape(height, -1).view(np.uint8)
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., -depth:]
        packed = np.packbits(bits.reshape(height, -1), axis=-1)
    return b"".join(b"\0" + row.tobytes() for row in packed)


def _gifs(rgb: Image.Image) -> dict[str, bytes]:
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(9), rgb.rotate(30)], "disposal": 2}
    return {
        "gif": encoded(rgb.quantize(200), "GIF"),
        "gif plain": encoded(rgb.quantize(16), "GIF", interlace=0),
        "gif grey": encoded(rgb.convert("L"), "GIF", comment=b"hello"),
        "gif key": encoded(rgb.quantize(16), "GIF", transparency=1),
        "gif animated": encoded(rgb, "GIF", **frames),
    }


def _bmps(rgb: Array) -> dict[str, bytes]:
    files = {f"bmp {bits}": _bmp(rgb, bits) for bits in (1, 4, 8, 16, 24, 32)}
    files["bmp fields"] = _bmp(rgb, 32, compression=3, extra=struct.pack("<III", 0xFF0000, 0xFF00, 0xFF))
    files["bmp 565"] = _bmp(rgb, 16, compression=3, extra=struct.pack("<III", 0xF800, 0x7E0, 0x1F))
    files["bmp v5"] = encoded(Image.fromarray(rgb).convert("RGBA"), "BMP")
    for bits, compression in ((8, 1), (4, 2)):
        run = b"".join(b"\x05\x21\x00\x03\x12\x34\x56\x00\x00\x02\x01\x00\x2a\x07\x00\x00" for _ in range(len(rgb)))
        files[f"bmp rle{bits}"] = _bmp(rgb, bits, compression=compression, data=run + b"\0\1")
    core = struct.pack("<IHHHH", 12, rgb.shape[1], rgb.shape[0], 1, 24) + files["bmp 24"][54:]
    files["bmp core"] = b"BM" + struct.pack("<IHHI", 14 + len(core), 0, 0, 26) + core
    files["bmp down"] = files["bmp 24"][:22] + struct.pack("<i", -rgb.shape[0]) + files["bmp 24"][26:]
    return files | {f"dib {name[4:]}": data[14:] for name, data in files.items()}


def _bmp(rgb: Array, bits: int, *, compression: int = 0, extra: bytes = b"", data: bytes | None = None) -> bytes:
    """A BMP. Source: Microsoft, BITMAPINFOHEADER."""
    height, width = rgb.shape[:2]
    palette = b"".join(bytes([n, 255 - n, n // 2, 0]) for n in range(2**bits)) if bits <= 8 else b""
    row_bytes = (width * bits + 31) // 32 * 4
    flat = np.resize(rgb, (height, row_bytes)).tobytes() if data is None else data
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(flat), 2835, 2835, 0, 0)
    start = 14 + len(header) + len(extra) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(flat), 0, 0, start) + header + extra + palette + flat


def _pillow_tiffs(rgb: Image.Image) -> dict[str, bytes]:
    bilevel = rgb.convert("1")
    files = {
        f"tiff {name}": encoded(rgb, "TIFF", compression=name)
        for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate", "raw")
    }
    files |= {f"tiff {name}": encoded(bilevel, "TIFF", compression=name) for name in ("group3", "group4", "tiff_ccitt")}
    files |= {f"tiff {mode}": encoded(rgb.convert(mode), "TIFF") for mode in ("1", "L", "P", "CMYK", "LA", "RGBA", "F")}
    files["tiff lab"] = encoded(rgb.convert("YCbCr"), "TIFF")
    files["tiff pages"] = encoded(rgb, "TIFF", save_all=True, append_images=[bilevel, rgb], exif=_exif(3))
    files["tiff big"] = encoded(rgb, "TIFF", big_tiff=True)
    return files


def _tiffs(rgb: Array) -> dict[str, bytes]:
    grey, alpha = np.ascontiguousarray(rgb[..., 1]), np.concatenate([rgb, rgb[..., :1]], axis=-1)
    wide: dict[str, Any] = {"photometric": "rgb"}
    tables: dict[str, tuple[Array, dict[str, Any]]] = {
        "planar": (np.moveaxis(rgb, -1, 0), {"photometric": "rgb", "planarconfig": "separate"}),
        "planar16": (np.moveaxis(rgb, -1, 0).astype(np.uint16) * 257, {**wide, "planarconfig": "separate"}),
        "tiles": (rgb, {**wide, "tile": (16, 32)}),
        "tiles deflate": (rgb, {**wide, "tile": (16, 16), "compression": "zlib", "predictor": True}),
        "strips lzw": (rgb, {**wide, "rowsperstrip": 5, "compression": "lzw", "predictor": True}),
        "zstd": (rgb, {**wide, "compression": "zstd"}),
        "lzma": (rgb, {**wide, "compression": "lzma"}),
        "webp": (rgb, {**wide, "compression": "webp"}),
        "jpeg tiles": (rgb, {**wide, "tile": (16, 16), "compression": "jpeg"}),
        "jpeg2000": (rgb, {**wide, "compression": "jpeg2000"}),
        "jxl": (rgb, {**wide, "compression": "jpegxl"}),
        "white": (grey, {"photometric": "miniswhite"}),
        "white16": (grey.astype(np.uint16) * 257, {"photometric": "miniswhite"}),
        "grey16 big": (grey.astype(np.uint16) * 257, {"byteorder": ">"}),
        "grey32": (grey.astype(np.uint32) << 24, {}),
        "grey i32": (grey.astype(np.int32), {}),
        "grey i8": (grey.astype(np.int8), {}),
        "float": (rgb.astype(np.float32) / 255, {**wide, "compression": "zlib", "predictor": 3}),
        "half": (rgb.astype(np.float16) / 255, wide),
        "double": (grey.astype(np.float64), {}),
        "five bands": (np.concatenate([alpha, alpha[..., :1]], axis=-1), {"photometric": "rgb"}),
        "alpha": (alpha, {**wide, "extrasamples": ["unassalpha"]}),
        "grey alpha": (alpha[..., :2], {"photometric": "minisblack", "extrasamples": ["assocalpha"]}),
        "bilevel": (grey > 99, {}),
        "pages": (np.stack([rgb, rgb[::-1]]), wide),
        "bigtiff": (rgb, {**wide, "bigtiff": True}),
        "bigtiff big": (rgb, {**wide, "bigtiff": True, "byteorder": ">"}),
        "palette": (grey, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256)}),
    }
    return {f"tiff {name}": _tiff(*table) for name, table in tables.items()}


def _deep_tiffs(grey: Array) -> dict[str, bytes]:
    files = {}
    for depth in (2, 4, 6, 10, 12, 14, 24):
        samples: Array = grey.astype(np.uint8 if depth <= 8 else np.uint16 if depth <= 16 else np.uint32)
        samples = np.right_shift(samples, 8 - depth) if depth <= 8 else np.left_shift(samples, depth - 8)
        files[f"tiff grey{depth}"] = tiff(samples, Tiff(bits=depth))
    return files


def _tiff(pixels: Array, options: Mapping[str, Any]) -> bytes:
    header = {name: value for name, value in options.items() if name in ("bigtiff", "byteorder")}
    rest = {name: value for name, value in options.items() if name not in header}
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **header) as file:
        file.write(np.ascontiguousarray(pixels), metadata=None, **rest)
    return buffer.getvalue()


def _pnms(rgb: Array) -> dict[str, bytes]:
    height, width = rgb.shape[:2]
    size, grey = b"%d %d " % (width, height), rgb[..., 0]
    text = b" ".join(b"%d" % value for value in rgb.flat)
    return {
        "pnm P1": b"P1 " + size + b"".join(b"%d" % (value > 99) for value in grey.flat),
        "pnm P2": b"P2 # a comment\n" + size + b"255\n" + b" ".join(b"%d" % value for value in grey.flat),
        "pnm P3": b"P3 " + size + b"255\n" + text,
        "pnm P4": b"P4 " + size[:-1] + b"\n" + np.packbits(grey > 99, axis=-1).tobytes(),
        "pnm P5": b"P5 " + size + b"255\n" + grey.tobytes(),
        "pnm P5 deep": b"P5 " + size + b"4095\n" + (grey.astype(np.uint16) * 16).astype(">u2").tobytes(),
        "pnm P6": b"P6 " + size + b"255\n" + rgb.tobytes(),
        "pnm Pf": b"Pf\n" + size[:-1] + b"\n-1.0\n" + (grey.astype("<f4") / 255).tobytes(),
    }


def _modern(rgb: Image.Image) -> dict[str, bytes]:
    pixels, grey, alpha = np.asarray(rgb), rgb.convert("L"), rgb.copy()
    alpha.putalpha(grey)
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(20)]}
    return {
        "webp": encoded(rgb, "WEBP", exif=_exif(6), icc_profile=b"icc " * 9),
        "webp lossless": encoded(rgb, "WEBP", lossless=True),
        "webp alpha": encoded(alpha, "WEBP"),
        "webp lossless alpha": encoded(alpha, "WEBP", lossless=True),
        "webp animated": encoded(alpha, "WEBP", **frames),
        "avif": encoded(rgb, "AVIF", exif=_exif(6)),
        "avif 444": encoded(rgb, "AVIF", subsampling="4:4:4"),
        "avif alpha": encoded(alpha, "AVIF"),
        "avif grey": encoded(grey, "AVIF"),
        "avif animated": encoded(rgb, "AVIF", **frames),
        "jp2": encoded(rgb, "JPEG2000"),
        "jp2 alpha": encoded(alpha, "JPEG2000"),
        "jp2 grey": encoded(grey, "JPEG2000", irreversible=True),
        "jp2 tiles": encoded(rgb, "JPEG2000", tile_size=(16, 16), quality_layers=[20, 10]),
        "jp2 stream": encoded(rgb, "JPEG2000", no_jp2=True),
        "jp2 deep": encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "JPEG2000"),
        "jxl": bytes(imagecodecs.jpegxl_encode(pixels)),
        "jxl lossless": bytes(imagecodecs.jpegxl_encode(pixels, lossless=True)),
        "jxl alpha": bytes(imagecodecs.jpegxl_encode(np.asarray(alpha))),
        "jxl grey16": bytes(imagecodecs.jpegxl_encode(np.asarray(grey).astype(np.uint16) * 257)),
    }


# --- archives --------------------------------------------------------------------------------------------------------


def archives() -> dict[str, bytes]:
    """Archives, Parquet files and arrays of a few images; the name begins with the suffix."""
    all_images = images()
    files = {
        f"{label}/{number}.{name.split()[0]}": all_images[name]
        for number, name in enumerate(("png 2 8", "jpeg 420 small", "gif", "png 0 1", "webp", "pnm P6"))
        for label in ("cat", "dog")
    }
    return {**_tars(files), **_zips(files), **_parquets(list(files.values())), **_arrays()}


def _tars(files: Mapping[str, bytes]) -> dict[str, bytes]:
    plain = {
        ".tar": tar_of(files),
        ".tar gnu": _tar(files, tarfile.GNU_FORMAT),
        ".tar pax": _tar(files, tarfile.PAX_FORMAT),
        ".tar webdataset": tar_of({f"{n}{end}": data for n, data in enumerate(files.values()) for end in (".png",)})
        + tar_of({f"{n}.cls": b"%d" % (n % 2) for n in range(len(files))}),
    }
    packed = {suffix: pack(plain[".tar pax"]) for suffix, pack in COMPRESSIONS.items()}
    return {**plain, **packed}


def _tar(files: Mapping[str, bytes], format: int) -> bytes:
    """With long names, attributes and links of both kinds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, (name, data) in enumerate(files.items()):
            info = tarfile.TarInfo("a long name/" * 12 * (number % 3 == 0) + name)
            info.size, info.pax_headers = len(data), {"comment": "ä" * number}
            tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo(f"links/{number}.png")
            link.type, link.linkname = (tarfile.SYMTYPE, f"../{name}") if number % 2 else (tarfile.LNKTYPE, info.name)
            tar.addfile(link)
    return buffer.getvalue()


def _zips(files: Mapping[str, bytes]) -> dict[str, bytes]:
    packings = {
        "stored": zipfile.ZIP_STORED,
        "deflated": zipfile.ZIP_DEFLATED,
        "bzip2": zipfile.ZIP_BZIP2,
        "lzma": zipfile.ZIP_LZMA,
    }
    made = {f".zip {name}": _zip(files, packing) for name, packing in packings.items()}
    made[".zip zip64"] = _zip(files, zipfile.ZIP_DEFLATED, is_large=True)
    made[".zip zstd"] = _zstd_zip(files)
    return made


def _zip(files: Mapping[str, bytes], packing: int, *, is_large: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=is_large) as member:
                member.write(data)
            archive.writestr(f"packed/{name}", data, packing)
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../dog/0.png")
        archive.comment = b"a comment"
    data = buffer.getvalue()
    return _with_zip64_end(data) if is_large else data


def _with_zip64_end(data: bytes) -> bytes:
    end = data.rindex(b"PK\5\6")
    count, size, start = struct.unpack_from("<HLL", data, end + 10)
    record = struct.pack("<LQHHLLQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<LLQL", 0x07064B50, 0, end, 1)
    return data[:end] + record + locator + b"PK\5\6" + bytes(4) + b"\xff" * 12 + struct.pack("<H", 0)


def _zstd_zip(files: Mapping[str, bytes]) -> bytes:
    data, directory = b"", b""
    for name, image in files.items():
        packed = bytes(pa.Codec("zstd").compress(image))
        fields = struct.pack("<HHHHHLLLHH", 20, 0, 93, 0, 0, zlib.crc32(image), len(packed), len(image), len(name), 0)
        directory += b"PK\1\2\x14\0" + fields + struct.pack("<HHHLL", 0, 0, 0, 0, len(data)) + name.encode()
        data += b"PK\3\4" + fields + name.encode() + packed
    counts = struct.pack("<HHHHLLH", 0, 0, len(files), len(files), len(directory), len(data), 0)
    return data + directory + b"PK\5\6" + counts


def _parquets(pictures: list[bytes]) -> dict[str, bytes]:
    labels = pa.array([n % 2 for n in range(len(pictures))], pa.int64())
    structs = pa.array([{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(pictures)])
    features = b'{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"]}}}}'
    plain = pa.table({"image": pictures, "label": labels, "split": ["train", "test"] * (len(pictures) // 2)})
    hugging = pa.table({"image": structs, "label": labels}).replace_schema_metadata({"huggingface": features})
    files = {
        f".parquet {name}": _parquet(plain, compression=name) for name in ("none", "snappy", "gzip", "zstd", "lz4")
    }
    files[".parquet dictionary"] = _parquet(pa.table({"image": pa.array(pictures).dictionary_encode()}))
    files[".parquet v2"] = _parquet(hugging, data_page_version="2.0", row_group_size=3)
    files[".parquet delta"] = _parquet(
        plain, use_dictionary=False, column_encoding={"image": "DELTA_LENGTH_BYTE_ARRAY"}, write_page_index=True
    )
    return files


def _parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"row_group_size": 5, **options})
    return buffer.getvalue()


def _arrays() -> dict[str, bytes]:
    pixels, labels = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4), np.arange(6, dtype=np.uint8)
    arrays: dict[str, Any] = {"x_train": pixels, "y_train": labels, "x_test": pixels, "y_test": labels}
    idx = b"\0\0\x08\x03" + struct.pack(">III", *pixels.shape) + pixels.tobytes()
    files = {".idx": idx, ".idx.gz": gzip.compress(idx, mtime=0)}
    for name, save in {"stored": np.savez, "deflated": np.savez_compressed}.items():
        buffer = io.BytesIO()
        save(buffer, **arrays)
        files[f".npz {name}"] = buffer.getvalue()
    return files
