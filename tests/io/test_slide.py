"""Slides: every format written here and read back, resolution, damage, absurd sizes."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest
import spatialdata
from PIL import Image

from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import full_resolution, levels
from pixnet.io import slide

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
openslide = pytest.importorskip("openslide")


@pytest.fixture(scope="module")
def pixels():
    """A smooth picture, so that lossy compression stays close: ``uint8 (y, x, 3)``, sizes that halve unevenly."""
    y, x = np.mgrid[:2311, :1733]
    waves = [128 + 100 * np.sin(x / a + y / b) for a, b in ((90, 130), (150, -70), (-200, 80))]
    return np.stack(waves, axis=-1).astype(np.uint8)


def write_pyramid(path, pixels, *, ome=False, compression=None, mpp=0.5, subifds=True, **options):
    small = [pixels[::4, ::4], pixels[::16, ::16]]
    tile = {"tile": (256, 256), "compression": compression, "photometric": "rgb", **options}
    with tifffile.TiffWriter(path, ome=ome) as tiff:
        metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp} if ome else None
        resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
        if subifds:
            tiff.write(pixels, subifds=2, metadata=metadata, **resolution, **tile)
        else:
            tiff.write(pixels, metadata=metadata, **resolution, **tile)
        for level in small:
            tiff.write(level, subfiletype=1, metadata=None, **tile)


@pytest.mark.parametrize("ome", [True, False])
@pytest.mark.parametrize("compression", [None, "jpeg", "jpeg2000", "deflate"])
def test_pyramidal_tiff(tmp_path, pixels, ome, compression):
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    write_pyramid(path, pixels, ome=ome, compression=compression, subifds=ome)
    sdata = slide(path)
    found = levels(sdata["he"])
    if ome:
        assert [level.data.shape for level in found[:3]] == [(3, 2311, 1733), (3, 578, 434), (3, 145, 109)]
    assert find_mpp(sdata, "he") == pytest.approx(0.5, rel=1e-4)
    part = found[0].data.data[:, 200:900, 1100:1700].compute().astype(int)
    difference = np.abs(part - pixels[200:900, 1100:1700].transpose(2, 0, 1))
    assert difference.max() <= (0 if compression in {None, "deflate"} else 24)
    assert difference.mean() < 4
    assert pickle.loads(pickle.dumps(found[0].data.data))[:, :10, :10].compute().shape == (3, 10, 10)


@pytest.mark.parametrize("compression", ["jpeg", "aperio_jp2000_rgb"])
def test_aperio_svs(tmp_path, pixels, compression):
    path = tmp_path / "a.svs"
    with tifffile.TiffWriter(path) as tiff:
        options = {"compression": compression, "photometric": "rgb", "metadata": None}
        about = "Aperio Image Library v10\n{0}x{1} (256x256)|AppMag = 20|MPP = 0.2520"
        tiff.write(pixels, tile=(256, 256), description=about.format(1733, 2311), **options)
        tiff.write(pixels[::8, ::8], description="Aperio Image Library v10", compression="jpeg", metadata=None)
        tiff.write(pixels[::4, ::4], tile=(256, 256), description=about.format(434, 578), **options)
    sdata = slide(path)
    assert find_mpp(sdata, "he") == pytest.approx(0.252)
    data = full_resolution(sdata["he"]).data
    assert data.shape == (3, 2311, 1733)
    part = data[:, 250:600, 300:777].compute().astype(int)
    assert np.abs(part - pixels[250:600, 300:777].transpose(2, 0, 1)).mean() < 4


def test_only_what_is_read_is_decoded(tmp_path, pixels):
    path = tmp_path / "a.tif"
    write_pyramid(path, np.tile(pixels, (3, 3, 1)), compression="jpeg", ome=True)
    sdata = slide(path)
    with path.open("r+b") as file, tifffile.TiffFile(path) as tiff:
        file.seek(tiff.pages[0].dataoffsets[-1])
        file.write(b"\0" * 200)  # the last tile is damaged
    data = full_resolution(slide(path)["he"]).data
    assert data[:, :64, :64].compute().shape == (3, 64, 64)
    with pytest.raises(OSError, match="a.tif cannot be read at rows .* damaged"):
        data[:, -10:, -10:].compute()
    assert sdata is not None


def test_scales_are_what_scanners_mean(tmp_path, pixels):
    from pixnet.io._slide import _scale

    assert _scale((2967, 2220), (741, 555)) == (4.0, 4.0)
    assert _scale((9911, 9274), (619, 579)) == (16.0, 16.0)
    assert _scale((1000, 1000), (300, 300)) == pytest.approx((10 / 3, 10 / 3))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_plain_picture_asks_for_mpp(tmp_path, pixels, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, **({"dpi": (72, 72)} if suffix == "jpg" else {}))
    with pytest.raises(ValueError, match="give mpp="):
        slide(path)
    sdata = slide(path, mpp=0.5, image_key="section")
    assert find_mpp(sdata, "section") == 0.5
    assert len(levels(sdata["section"])) > 1
    assert np.abs(full_resolution(sdata["section"]).values.astype(int) - pixels.transpose(2, 0, 1)).mean() < 3
    assert find_mpp(slide(path, mpp=False), "he") is None


def test_picture_with_a_real_resolution(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png", dpi=(25_400 / 0.46, 25_400 / 0.46))
    assert find_mpp(slide(tmp_path / "a.png"), "he") == pytest.approx(0.46, rel=1e-3)


def test_transparent_is_white(tmp_path):
    rgba = np.zeros((40, 50, 4), dtype=np.uint8)
    rgba[:20] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    found = full_resolution(slide(tmp_path / "a.png", mpp=1)["he"]).values
    assert found[:, 0, 0].tolist() == [10, 20, 30]
    assert found[:, 30, 0].tolist() == [255, 255, 255]


def test_anisotropic_pixels_are_refused(tmp_path, pixels):
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="rgb", resolution=(2e4, 1e4), resolutionunit="CENTIMETER", metadata=None
    )
    with pytest.raises(ValueError, match="0.5 µm/px in x and 1 µm/px in y"):
        slide(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((64, 64), np.uint8), {"photometric": "minisblack"}, "greyscale"),
        (np.zeros((64, 64, 3), np.uint16), {"photometric": "rgb"}, "uint16"),
        (
            np.zeros((4, 64, 64), np.uint8),
            {"photometric": "minisblack", "metadata": {"axes": "CYX"}},
            "4 separate channels",
        ),
        (
            np.zeros((2, 5, 64, 64), np.uint8),
            {"photometric": "minisblack", "metadata": {"axes": "CZYX"}},
            "5 z planes, 2 separate channels",
        ),
    ],
)
def test_not_he(tmp_path, array, options, message):
    tifffile.imwrite(tmp_path / "a.ome.tif", array, ome=True, **options)
    with pytest.raises(ValueError, match=f"not an H&E picture: .*{message}"):
        slide(tmp_path / "a.ome.tif", mpp=0.5)


def test_greyscale_picture(tmp_path):
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="greyscale"):
        slide(tmp_path / "a.png", mpp=1)


def test_paths(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        slide(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        slide(tmp_path / "none.svs")
    (tmp_path / "empty.svs").touch()
    with pytest.raises(ValueError, match="is empty"):
        slide(tmp_path / "empty.svs")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="not a readable picture"):
        slide(tmp_path / "text.jpg", mpp=1)


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), True])
def test_wrong_mpp(tmp_path, mpp):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises((TypeError, ValueError), match="mpp is"):
        slide(tmp_path / "a.png", mpp=mpp)


@pytest.mark.parametrize("share", [0.0005, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["tif", "ome.tif", "jpg"])
def test_truncated(tmp_path, pixels, share, kind):
    path = tmp_path / f"whole.{kind}"
    if kind == "jpg":
        Image.fromarray(pixels).save(path)
    else:
        write_pyramid(path, pixels, ome=kind.startswith("ome"), compression="jpeg")
    content = path.read_bytes()
    cut = tmp_path / f"cut.{kind}"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="truncated|damaged|readable"):
        slide(cut, mpp=0.5)


def test_a_file_that_lost_its_metadata_only(tmp_path, pixels):
    """OME-XML lies behind the pixels: without it the pixels are whole, and the pixel size is asked for."""
    write_pyramid(tmp_path / "whole.ome.tif", pixels, ome=True)
    cut = tmp_path / "cut.tif"
    cut.write_bytes((tmp_path / "whole.ome.tif").read_bytes()[:-100])
    with tifffile.TiffFile(cut) as tiff:
        assert tiff.pages[0].description == ""
    found = full_resolution(slide(cut, mpp=0.5)["he"]).values
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1))


def test_a_lost_page_is_noticed(tmp_path, pixels):
    """A file whose slide is cut off must not open as its thumbnail."""
    with tifffile.TiffWriter(tmp_path / "whole.tif") as tiff:
        for picture in (pixels[::16, ::16], pixels):
            tiff.write(picture, photometric="rgb", metadata=None)
    with tifffile.TiffFile(tmp_path / "whole.tif") as tiff:
        second = tiff.pages[1].offset
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:second])
    with pytest.raises(ValueError, match="truncated: its next page"):
        slide(tmp_path / "cut.tif", mpp=0.5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (2, 2), (3, 5), (1, 5000)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_tiny_slides(tmp_path, shape, suffix):
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        Image.fromarray(picture).save(path)
    else:
        tifffile.imwrite(path, picture, photometric="rgb", tile=(16, 16), metadata=None)
    sdata = slide(path, mpp=0.5)
    sdata.write(tmp_path / "a.zarr")
    for found in (sdata, spatialdata.read_zarr(tmp_path / "a.zarr")):
        np.testing.assert_array_equal(full_resolution(found["he"]).values, picture.transpose(2, 0, 1))


def bomb(path, width, height, tile=None):
    """A TIFF of a few hundred bytes that declares any size."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3)]
    if tile:
        tags += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8), (325, 4, 1, 100)]
    else:
        tags += [(273, 4, 1, 8), (278, 4, 1, height), (279, 4, 1, 100)]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 200) + bytes(192) + struct.pack("<H", len(tags)) + directory + bytes(4)
    )


@pytest.mark.parametrize(
    ("size", "tile", "message"),
    [
        (200_000, None, "200,000 x 200,000 px in one piece"),
        (2_000_000, 256, "lists 1 of 61,042,969 tiles"),
        (60_000, 65_536, "60,000 x 60,000 px in one piece"),
    ],
)
def test_bomb_tiff(tmp_path, size, tile, message):
    bomb(tmp_path / "bomb.tif", size, size, tile)
    with pytest.raises(ValueError, match=message):
        slide(tmp_path / "bomb.tif", mpp=0.5)


def test_bomb_png(tmp_path):
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(ValueError, match="60,000 x 60,000 px"):
        slide(tmp_path / "bomb.png", mpp=0.5)


def test_round_trip_through_zarr(tmp_path, pixels):
    write_pyramid(tmp_path / "a.ome.tif", pixels, ome=True, compression="deflate")
    sdata = slide(tmp_path / "a.ome.tif")
    sdata.write(tmp_path / "a.zarr")
    back = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert find_mpp(back, "he") == pytest.approx(0.5)
    assert (full_resolution(back["he"]).values == pixels.transpose(2, 0, 1)).all()


@pytest.mark.data
class TestRealFiles:
    def test_aperio(self, shared_data):
        sdata = slide(shared_data / "wsi" / "CMU-1-Small-Region.svs")
        assert find_mpp(sdata, "he") == pytest.approx(0.499)
        found = full_resolution(sdata["he"])
        assert found.shape == (3, 2967, 2220)
        assert (
            found.values == tifffile.imread(shared_data / "wsi" / "CMU-1-Small-Region.svs").transpose(2, 0, 1)
        ).all()

    def test_ome_tiff(self, shared_data):
        sdata = slide(shared_data / "wsi" / "instanseg_HE_example.tif")
        assert find_mpp(sdata, "he") == pytest.approx(0.5, rel=1e-3)

    def test_jpeg_asks(self, shared_data):
        with pytest.raises(ValueError, match="give mpp="):
            slide(shared_data / "wsi" / "stardist_histo.jpg")

    def test_multi_channel(self, shared_data):
        with pytest.raises(ValueError, match="5 z planes, 3 separate channels"):
            slide(shared_data / "wsi" / "multi-channel-z-series.ome.tif")


def test_a_dicom_that_is_not_a_slide_is_not_called_damaged(tmp_path):
    path = tmp_path / "scan.dcm"
    path.write_bytes(bytes(128) + b"DICM" + bytes(2000))
    with pytest.raises(ValueError, match="DICOM file that OpenSlide does not read .*tiled pyramidal TIFF") as error:
        slide(path, mpp=0.5)
    assert "damaged" not in str(error.value)
