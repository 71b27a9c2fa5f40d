"""How GPT-NeoX programs start and end: failures have exit code 1, settings reach the ranks."""

from __future__ import annotations

import sys

import yaml

from megatron_patch.neox.upstream_fixes.processes import ChildProcess


def test_failures_of_the_ranks_have_exit_code_1(in_neox, config):
    """GPT-NeoX calls `exit()`, has nothing to train on, or has a prompt that is too long."""
    code = """
    from types import SimpleNamespace
    from megatron import text_generation_utils, training
    def code_of(function, **arguments):
        try:
            function(**arguments)
        except SystemExit as end:
            return end.code
    codes = []
    neox_args.optimizer = None
    codes.append(code_of(training.setup_model_and_optimizer, neox_args=neox_args))
    neox_args.split = "0,100,0"
    codes.append(code_of(training.build_train_valid_test_data_loaders, neox_args=neox_args))
    neox_args.zero_stage, neox_args.pipe_parallel_size = 3, 1
    codes.append(code_of(training.setup_model_and_optimizer, neox_args=neox_args))
    def generate(prompt):
        model = SimpleNamespace(module=SimpleNamespace(clear_cache=lambda: None))
        next(text_generation_utils.stream_tokens(neox_args, model, [prompt]))
    codes.append(code_of(generate, prompt=[5] * 64))
    answer(codes)
    """
    ended = "MetaLA: GPT-NeoX ended the run, for the reason that it printed above"
    assert in_neox(config, code) == [
        ended,
        "MetaLA: split: found '0,100,0', wanted a share of documents to train on",
        ended,
        "MetaLA: seq_length: found 64, wanted more than the prompt's 64 tokens",
    ]


def test_a_program_that_deepy_did_not_start_says_so(in_neox, config):
    code = """
    sys.argv = ["/x/train.py", "run.yml"]
    try:
        NeoXArgs.consume_neox_args()
    except SystemExit as end:
        answer(end.code)
    """
    wanted = "wanted: python ./deepy.py train.py FILE.yml"
    assert in_neox(config, code) == f"MetaLA: train.py was started without deepy.py, {wanted}"


def test_exit_interval_ends_with_exit_code_0(in_neox, config):
    code = """
    from megatron import training
    codes = []
    for interval in (2, 3):
        neox_args.exit_interval = interval
        def train(neox_args=None, **arguments):
            neox_args.iteration = 2
            raise SystemExit
        training.train = train
        try:
            training.pretrain(neox_args=neox_args)
        except SystemExit as end:
            codes.append(end.code is None)
        training.initialize_megatron = lambda **arguments: None
    answer(codes)
    """
    assert in_neox({**config, "train_iters": 2}, code) == [True, False]


def test_a_killed_child_has_a_positive_exit_code():
    """DeepSpeed's launcher passes on no other."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with ChildProcess([sys.executable, "-c", code]) as child:
        assert child.wait() == 137
    assert child.returncode == 137


def test_two_files_may_give_one_key(in_neox, config, tmp_path):
    """The last one stands, for GPT-NeoX and for what it saves; unknown keys are named."""
    (tmp_path / "a.yml").write_text(yaml.safe_dump({**config, "seq-length": 32}))
    (tmp_path / "b.yml").write_text("{'seq_length': 48, 'max-position-embeddings': 48}")
    (tmp_path / "c.yml").write_text("{'seq_lenght': 48}")
    code = """
    import os
    from megatron_patch.architecture import SettingsError
    from megatron_patch.neox.yaml_config import merge_yaml_texts
    files = [os.path.join(%r, name) for name in ("a.yml", "b.yml", "c.yml")]
    args = NeoXArgs.from_ymls(files[:2])
    saved = [merge_yaml_texts(dict(items))["seq_length"]
             for items in (args.config_files.items(), reversed(args.config_files.items()))]
    try:
        NeoXArgs.from_ymls(files)
    except SettingsError as error:
        answer([args.seq_length, args.max_position_embeddings, saved, str(error)])
    """
    *found, unknown = in_neox(config, code % str(tmp_path))
    assert found == [48, 48, [48, 48]]
    assert unknown.startswith("seq_lenght: found in the YAML files, wanted a setting that GPT-NeoX")
    assert "seq_length" in unknown


def test_gpt2_tokenizer_reads_its_two_files(in_neox, config, tmp_path):
    """Against the same vocabulary as a tokenizer.json."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(__file__, vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(tmp_path))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    code = """
    from megatron.tokenizer import build_tokenizer
    text = "import os\\n\\n  def f(x): it's 12<|endoftext|>\\u00e9t\\u00e9 "
    found = []
    for kind, file in (("HFTokenizer", "tokenizer.json"), ("GPT2BPETokenizer", "vocab.json")):
        neox_args.tokenizer_type, neox_args.vocab_file = kind, %r + "/" + file
        neox_args.merge_file = %r + "/merges.txt"
        tokenizer = build_tokenizer(neox_args)
        tokens = tokenizer.tokenize(text)
        found.append([tokens, tokenizer.eod, tokenizer.vocab_size, tokenizer.vocab])
    answer([*found, tokenizer.detokenize(tokens) == text, tokenizer.inv_vocab[tokens[0]]])
    """
    one, other, is_whole, first = in_neox(config, code % (str(tmp_path), str(tmp_path)))
    assert one == other and is_whole
    assert one[3][first] == one[0][0]
