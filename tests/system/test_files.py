"""Writing that survives a crash: a file is whole, old or new, whatever happens to its writer."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kaggle_utils.system.files import read_json, replacing, shrink_png, write_text

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_finished_file_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    for text in ("old", "new, and larger"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent  # a rename is atomic within one file system
            temporary.write_text(text)
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    """A real process, killed in the middle of its writing; and the next writer is not disturbed by what it left."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    code = (
        "import sys, time; from kaggle_utils.system.files import replacing\n"
        f"with replacing({str(path)!r}) as temporary, open(temporary, 'wb') as file:\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as writer:
        assert writer.stdout.readline() == "writing\n"
        os.kill(writer.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    assert writer.returncode != 0 and path.read_bytes() == b"old"
    assert [left.suffix for left in tmp_path.iterdir() if left != path] == [".tmp"]  # never taken for a finished file
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_reader_never_sees_half_a_file(tmp_path):
    """Readers and two writers at once: each read gives one writer's whole text."""
    path, texts, stop = tmp_path / "file.txt", ("a" * 100_000, "b" * 70_000), threading.Event()
    seen, failures = set(), []
    write_text(path, texts[0])

    def write(text):
        try:
            while not stop.is_set():
                write_text(path, text)
        except OSError as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    try:
        for _ in range(200):
            seen.add(path.read_text())
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert seen <= set(texts) and not failures and list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_unix_line_ends(tmp_path):
    """On every platform: the CSV and the picks are read elsewhere."""
    write_text(tmp_path / "file.txt", "β\nÅ\n")
    assert (tmp_path / "file.txt").read_bytes() == "β\nÅ\n".encode()


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    """As editors on Windows write it."""
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"name": "spike"}')
    assert read_json(tmp_path / "file.json") == {"name": "spike"}


def test_a_small_png_keeps_a_rare_colour():
    """A legend's dot among the many greys and blends of slices; the palette of most colours moved it by 40."""
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[..., :] = np.random.default_rng(0).integers(0, 256, (200, 300, 1))
    pixels[:, :100, 0] = 230  # blends of one frequent colour with the greys
    pixels[:3, -3:] = 204, 121, 167
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "png")
        small = Image.open(io.BytesIO(shrink_png(file.getvalue())))
    moved = np.abs(np.asarray(small.convert("RGB")).astype(int) - pixels)
    assert small.mode == "P" and moved.max() <= 12
