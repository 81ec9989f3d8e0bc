"""Profiles and options: the command line wins, and what is wrong is named."""

import pytest

from dejavu.config import ServeConfig, load_config, make_config
from dejavu.errors import ConfigError


def test_command_line_wins_over_the_profile(tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("pp: 2\nmicrobatch-size: 3\nkv_memory: 1.5G\nlayers_per_stage: [1, 2]\n")
    config = load_config(profile, {"microbatch_size": 5})
    assert (config.pp, config.microbatch_size, config.kv_memory, config.layers_per_stage) == (2, 5, 3 * 2**29, (1, 2))


def test_workload_is_found_beside_the_profile(tmp_path):
    (tmp_path / "p.yaml").write_text("workload: w.jsonl\n")
    (tmp_path / "w.jsonl").write_text("")
    assert load_config(tmp_path / "p.yaml", {}).workload == str(tmp_path / "w.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppp: 2", "unknown key 'ppp' in {}: did you mean 'pp'?"),
        ("xyzzy: 2", "unknown key 'xyzzy' in {}: `dejavu serve --help` lists the right ones"),
        ("pp: 0", "pp 0 in {}: input should be greater than or equal to 1"),
        ("dtype: int8", "dtype 'int8' in {}: input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("kv_memory: lots", "kv_memory 'lots' in {}: write a number of bytes such as 512M or 1.5G"),
        ("pp: 3\nnum_microbatches: 2", "num_microbatches 2 leaves stages idle: use at least the 3 stages"),
        ("pp: 3\nlayers_per_stage: 1,2", "layers_per_stage names 2 stages and pp is 3: give one number per stage"),
        ("- pp", "profile {} holds no mapping of keys to values: write lines such as `pp: 2`"),
        ("pp: [", "profile {} is not YAML: "),
    ],
)
def test_names_what_is_wrong(tmp_path, text, message):
    profile = tmp_path / "p.yaml"
    profile.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(profile, {})
    assert message.format(profile) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_replace_keeps_the_rest_and_checks():
    config = make_config({"pp": 2, "tp": 2})
    assert config.replace(pp=3).num_workers == 6
    with pytest.raises(ConfigError):
        config.replace(pp=-1)


def test_every_field_says_what_it_does():
    for name, field in ServeConfig.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["group"], name
