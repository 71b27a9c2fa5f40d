"""Settings that GPT-NeoX never reads are refused where they are given, not at their default."""

from __future__ import annotations

import json

from megatron_patch.neox.unread_settings import INSTEAD

GIVEN = {
    **dict.fromkeys(INSTEAD, 3),
    **dict.fromkeys(("deepscale", "dynamic_loss_scale", "no_save_optim"), True),
    **dict.fromkeys(("do_test", "do_train", "do_valid"), False),
    **dict.fromkeys(("zero_contiguous_gradients", "zero_reduce_scatter"), True),
    **dict.fromkeys(("clip_grad", "lr", "min_scale", "loss_scale_window", "short_seq_prob"), 0.5),
    "optimizer_type": "sm3",
    "param_sharing_style": "spaced",
    "scheduler": {"params": {}, "type": "WarmupLR"},
}


def test_what_nothing_reads_is_refused(in_neox, config, tmp_path):
    code = """
    import yaml
    from megatron_patch.architecture import SettingsError
    yaml_file, given = %r, json.loads(%r)
    def read(**changes):
        with open(yaml_file, "w") as file:
            yaml.safe_dump({**settings, **changes}, file)
        try:
            NeoXArgs.from_ymls([yaml_file])
        except SettingsError as error:
            return str(error)
    norms = [read(use_bias_in_norms=False), read(use_bias_in_norms=False, norm="layernorm")]
    lines = {name: read(**{name: value}) for name, value in given.items()}
    default = read(**{name: getattr(NeoXArgs, name) for name in given})
    answer([lines, default, norms])
    """
    config.pop("rms_norm_epsilon")
    call = code % (str(tmp_path / "a.yml"), json.dumps(GIVEN))
    lines, at_defaults, norms = in_neox(config, call)
    for name, instead in INSTEAD.items():
        wanted = f"none, but {instead}" if instead else "none: nothing reads it"
        assert lines[name] == f"{name}: found {GIVEN[name]!r}, wanted {wanted}"
    assert at_defaults is None and norms[0] is None
    assert norms[1].startswith("use_bias_in_norms: found False, wanted true with norm: layernorm")
