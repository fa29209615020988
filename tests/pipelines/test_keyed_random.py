"""Keyed numbers: every stream is that of a new Philox generator, whatever was read before, and where."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.keyed_random import Key, raw_words, uniforms

COUNTS = (0, 1, 3, 4, 5, 31, 32, 33, 100)
"""Round Philox's block of 4 words, and round the number up to which words are read one by one."""


def fresh_words(key: Key, count: int) -> NDArray[np.uint64]:
    """The words of a generator made for this key alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    words: NDArray[np.uint64] = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
    return words


def require_fresh_streams(number: int) -> int:
    """Every count after every other, under keys of this number."""
    for before in COUNTS:
        for count in COUNTS:
            raw_words(("before", number), before)
            found, expected = raw_words(("of", number, count), count), fresh_words(("of", number, count), count)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tolist() == expected.tolist(), (number, before, count)
    return number


@given(key=st.tuples(st.text(max_size=8), st.integers()), count=st.integers(0, 80))
def test_a_stream_is_that_of_a_new_generator(key: Key, count: int) -> None:
    assert raw_words(key, count).tolist() == fresh_words(key, count).tolist()


def test_threads_do_not_disturb_each_others_streams() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(require_fresh_streams, range(32))) == list(range(32))


_FORKS = """
import os
from pipelines.keyed_random import raw_words
raw_words(("before", 0), 3)
if (child := os.fork()):
    os.waitpid(child, 0)
print([int(word) for word in raw_words(("x", 1), 6)], flush=True)
os._exit(0)
"""


def test_a_forked_process_reads_the_streams_of_its_parent() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _FORKS], cwd=root, capture_output=True, text=True, timeout=60)
    assert [json.loads(line) for line in done.stdout.splitlines()] == 2 * [fresh_words(("x", 1), 6).tolist()]


def test_uniform_numbers_have_all_53_bits_of_their_words() -> None:
    words = fresh_words(("bits",), 64).tolist()
    assert [number * 2**53 for number in uniforms(("bits",), 64).tolist()] == [word >> 11 for word in words]
    assert {word >> 11 & 1 for word in words} == {0, 1}
