import pytest

from dejavu.model.fingerprint import SAMPLE_BYTES, fingerprint


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    return tmp_path


def test_nothing_there_has_no_fingerprint(tmp_path):
    assert fingerprint(tmp_path) == ""
    assert fingerprint(tmp_path / "none") == ""


def test_what_a_model_is_made_of_counts(checkpoint):
    found = {fingerprint(checkpoint)}
    assert fingerprint(checkpoint) in found
    weights = checkpoint / "model.safetensors"
    size = weights.stat().st_size
    for at in (0, size // 15, size - 1):  # where samples lie
        data = bytearray(bytes(range(256)) * 2000)
        data[at] ^= 1
        weights.write_bytes(data)
        found.add(fingerprint(checkpoint))
    weights.write_bytes(data + b"x")
    found.add(fingerprint(checkpoint))
    (checkpoint / "config.json").write_text("{ }")
    found.add(fingerprint(checkpoint))
    (checkpoint / "more.safetensors").write_bytes(b"")
    found.add(fingerprint(checkpoint))
    assert len(found) == 7


def test_a_small_file_counts_whole_and_alone(tmp_path):
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    one.write_bytes(b"a" * (SAMPLE_BYTES - 1) + b"b")
    two.write_bytes(b"a" * SAMPLE_BYTES)
    assert fingerprint(one) != fingerprint(two)
