"""Make an assignment: the real code with some function bodies taken out, their tests, and a text.

    python assignments/make.py 2 OUT                          # assignment 2, in the new folder OUT
    python assignments/make.py 4 OUT --base out/pretrain.pt   # with a trained base for RecA
    python assignments/make.py list                           # every blank, its equation, its tests
    python assignments/make.py check                          # does a hand-out show a solution?

A blank is a function of the real code, by file and name. Its signature and docstring stay; its
body, comments included, becomes `raise NotImplementedError("<name of the equation>")`. No marker
stands in the source: `ast` finds the lines. The blanks of later assignments are taken out too, and
what is too like a blank is left out (TWINS) or written in another way (REWRITTEN).
"""

import argparse
import ast
import json
import shutil
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# beside this file, also when it is imported from elsewhere
sys.path.insert(0, str(HERE))
from leaks import Body, find_leaks  # noqa: E402

MODULES = (
    "words encoder tokenizer figures images shapes folders hub pretrained paradigms data model "
    "feature_cache captioner recon_loss sample evaluate config engine train"
)
CODE = [f"{name}.py" for name in MODULES.split()]
CODE += ["requirements.txt", "pyproject.toml", "LICENSE"]
RUNS = ["variants.py", "experiments.py"]  # handed out from assignment 4 on
TITLES = {
    1: "1_encoder.md",
    2: "2_transformer.md",
    3: "3_flow.md",
    4: "4_reca.md",
    5: "5_open.md",
}
# What each hand-out holds of tests/, beside the tests of its own blanks.
TESTS = ["conftest.py", "small.py", "laws.py"]
FIXTURES = {1: ["fixtures"]}


@dataclass(frozen=True)
class Blank:
    """A function body to be written, and the tests that it has to pass."""

    assignment: int
    name: str  # module.function or module.Class.function
    equation: str  # what the student is told is missing
    tests: tuple[str, ...]  # file.py::function
    points: int = 10

    @property
    def file(self) -> str:
        return self.name.split(".")[0] + ".py"

    @property
    def function(self) -> str:
        """The name within the file: function or Class.function."""
        return self.name.split(".", 1)[1]


def in_file(assignment: int, *functions: str) -> tuple[str, ...]:
    """The tests of that name in the file of an assignment."""
    return tuple(f"{test_file(assignment)}::{function}" for function in functions)


def test_file(assignment: int) -> str:
    return f"test_assignments_{assignment}.py"


BLANKS = [
    Blank(
        1,
        "encoder.Attention.forward",
        "scaled dot-product attention, arXiv 1706.03762, eq. 1",
        in_file(
            1,
            "test_encoder_attention_is_torchs",
            "test_encoder_attention_by_hand",
            "test_encoder_attention_learns",
        ),
    ),
    Blank(
        1,
        "encoder.ViT.position_embeddings",
        "position embeddings resized to another grid, arXiv 2010.11929, section 3.2",
        in_file(
            1,
            "test_positions_resize_as_the_publisher_does",
            "test_native_positions_are_as_trained",
            "test_resized_positions_learn",
            "test_resized_positions_keep_their_dtype",
        ),
    ),
    Blank(
        1,
        "encoder.ViT.forward",
        "from pixels to named tokens, arXiv 2010.11929, eq. 1 to 4",
        in_file(
            1,
            "test_each_output_of_the_encoder",
            "test_each_output_of_the_encoder_learns",
            "test_a_native_size_that_the_patch_does_not_divide",
            "test_images_are_cast_to_the_weights",
            "test_images_are_checked_first",
            "test_features_are_those_of_the_real_library",
        ),
        points=20,
    ),
    Blank(
        1,
        "pretrained.rename_keys",
        "strict loading: every tensor of the file has one name",
        in_file(
            1,
            "test_each_tensor_gets_our_name",
            "test_what_is_not_of_the_encoder_is_left_out_by_name",
            "test_two_tensors_of_one_name_are_an_error",
        ),
    ),
    Blank(
        2,
        "model.Attention.forward",
        "multi-head attention, arXiv 1706.03762, section 3.2.2",
        in_file(
            2,
            "test_self_attention_is_torchs",
            "test_cross_attention_is_torchs",
            "test_attention_by_hand",
            "test_attention_learns",
            "test_cached_attention_is_causal_attention",
        ),
    ),
    Blank(
        2,
        "model.prefix_mask",
        "attention mask: a causal prefix, an image that attends to the prefix and itself",
        in_file(
            2,
            "test_prefix_mask_is_the_picture",
            "test_repeats_of_a_mask_are_alike_and_apart",
        ),
    ),
    Blank(
        2,
        "model.UnifiedModel.predict_image",
        "the image positions behind their prefix",
        in_file(
            2,
            "test_who_attends_to_whom_by_gradient",
            "test_the_prefix_is_causal_and_never_sees_the_image",
            "test_repeats_that_share_a_prefix_equal_repeats_apart",
            "test_without_blocks_an_image_position_is_itself",
            "test_words_of_the_prefix_have_their_positions",
            "test_all_learns_through_the_image",
        ),
    ),
    Blank(
        2,
        "model.UnifiedModel.text_logits",
        "p(word | prefix, words before it)",
        in_file(
            2,
            "test_no_word_sees_a_later_word",
            "test_logits_are_of_the_next_word",
            "test_without_blocks_logits_are_of_the_last_word_alone",
            "test_all_learns_through_the_words",
        ),
    ),
    Blank(
        2,
        "model.UnifiedModel.predict_image_cached",
        "the same with the prefix's keys and values read once",
        in_file(
            2,
            "test_cached_image_equals_uncached",
            "test_two_caches_do_not_meet",
        ),
    ),
    Blank(
        2,
        "recon_loss.text_loss",
        "next-word cross-entropy without <pad>",
        in_file(
            2,
            "test_text_loss_is_the_mean_over_all_words",
            "test_text_loss_by_hand",
            "test_text_loss_learns",
            "test_text_loss_is_computed_in_float32",
            "test_text_loss_of_the_model",
        ),
    ),
    Blank(
        3,
        "paradigms.interpolate",
        "x_t = t image + (1 - t) noise, arXiv 2209.03003, eq. 1",
        in_file(
            3,
            "test_interpolate_goes_from_noise_to_image",
            "test_the_velocity_of_the_path_is_constant",
            "test_interpolate_passes_gradients",
        ),
    ),
    Blank(
        3,
        "paradigms.velocity_squared_error",
        "the velocity's squared error from a predicted image, arXiv 2511.13720, eq. 6",
        in_file(
            3,
            "test_velocity_squared_error_by_hand",
            "test_velocity_squared_error_has_a_time_for_each_image_or_patch",
            "test_velocity_squared_error_passes_gradients",
        ),
    ),
    Blank(
        3,
        "paradigms.Flow.loss",
        "E |v_pred - v|^2",
        in_file(
            3,
            "test_the_model_sees_noised_patches_and_their_times",
            "test_flow_loss_by_hand",
            "test_flow_loss_learns",
            "test_repeats_of_an_image_share_a_prefix",
        ),
    ),
    Blank(
        3,
        "recon_loss.drop_prefix",
        "dropped conditions, for classifier-free guidance, arXiv 2207.12598, algorithm 1",
        in_file(
            3,
            "test_dropped_conditions_are_the_empty_caption",
            "test_each_condition_is_dropped_by_chance",
            "test_kept_and_dropped_conditions_learn",
            "test_a_dropped_condition_has_the_dtype_of_the_prefix",
        ),
    ),
    Blank(
        3,
        "paradigms.cfg_predict",
        "uncond + s (cond - uncond), with s = 1 + w of arXiv 2207.12598, eq. 6",
        in_file(
            3,
            "test_guidance_goes_from_none_to_the_condition_and_beyond",
            "test_guidance_doubles_every_input",
            "test_guidance_passes_gradients",
        ),
    ),
    Blank(
        3,
        "paradigms.euler_sample",
        "from noise to image in Euler steps, with resampled noise",
        in_file(
            3,
            "test_an_exact_model_recovers_the_data_in_any_number_of_steps",
            "test_without_resampling_the_steps_are_eulers",
            "test_the_share_of_resampled_noise",
            "test_images_of_a_batch_are_sampled_apart",
        ),
        points=20,
    ),
    Blank(
        4,
        "model.Connector.forward",
        "learned queries that attend to patch tokens and predict words, arXiv 2301.12597",
        in_file(
            4,
            "test_queries_read_the_patch_tokens",
            "test_patch_tokens_are_a_normalised_set",
            "test_logits_are_linear_in_the_last_norm_and_in_word_head",
            "test_all_of_the_connector_learns",
        ),
    ),
    Blank(
        4,
        "model.UnifiedModel.visual_prefix",
        "<bos>, then softmax(logits) @ wte, arXiv 2502.01341",
        in_file(
            4,
            "test_one_hot_visual_words_are_a_caption",
            "test_visual_words_are_expected_embeddings",
            "test_visual_prefix_by_hand",
            "test_visual_words_and_embeddings_learn",
        ),
    ),
    Blank(
        4,
        "model.UnifiedModel.encode_visual_words",
        "visual words, with the encoder frozen",
        in_file(
            4,
            "test_the_encoder_sees_images_at_its_size",
            "test_known_features_spare_the_encoder",
            "test_visual_words_train_the_connector_never_the_encoder",
            "test_a_subclass_may_change_the_visual_words",
        ),
    ),
    Blank(
        4,
        "recon_loss.recon_loss",
        "-log p(image | its visual words), arXiv 2509.07295",
        in_file(
            4,
            "test_recon_is_t2i_with_another_prefix",
            "test_reca_trains_the_transformer_and_not_what_makes_the_condition",
            "test_the_prefix_comes_from_recon_prefix",
            "test_recon_loss_passes_known_features_on",
        ),
        points=20,
    ),
]

# Functions so like a blank that they are left out as well: {name: (the blank, what it is)}. They
# are graded nowhere, and nothing that an assignment asks for needs them.
TWINS = {
    "recon_loss.caption_loss": ("recon_loss.text_loss", "the encoder stage's captioning loss"),
    "paradigms.MaskedAutoregressive.loss": ("paradigms.Flow.loss", "the loss of mar"),
    "variants.FeaturePrefix.raw_tokens": (
        "model.UnifiedModel.encode_visual_words",
        "the variant `features`",
    ),
}


@dataclass(frozen=True)
class Rewrite:
    """A function that computes the same in another way, as long as a blank like it is blank."""

    name: str
    like: tuple[str, ...]  # blanks
    new: str  # its body, or the line in place of `old`
    old: str = ""


# torch's own function for attention shows no heads, shapes and scales
TORCHS_POOL = """
query = self.q(self.probe)[:, None].expand(-1, len(x), -1)  # (1, B, D)
identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
weights = torch.cat([identity, self.kv.weight])
bias = torch.cat([torch.zeros_like(self.q.bias), self.kv.bias])
tokens = x.transpose(0, 1)  # (T, B, D)
pooled, _ = F.multi_head_attention_forward(
    query,
    tokens,
    tokens,
    x.shape[2],
    self.heads,
    weights,
    bias,
    bias_k=None,
    bias_v=None,
    add_zero_attn=False,
    dropout_p=0.0,
    out_proj_weight=self.proj.weight,
    out_proj_bias=self.proj.bias,
    need_weights=False,
)
return pooled[0] + self.mlp(self.norm(pooled[0]))  # (B, D)
"""
TORCHS_ATTENTION = """
tokens = x.transpose(0, 1)  # (T, B, D)
out, _ = F.multi_head_attention_forward(
    tokens,
    tokens,
    tokens,
    x.shape[2],
    self.heads,
    self.qkv.weight,
    self.qkv.bias,
    bias_k=None,
    bias_v=None,
    add_zero_attn=False,
    dropout_p=0.0,
    out_proj_weight=self.proj.weight,
    out_proj_bias=self.proj.bias,
    need_weights=False,
)
return out.transpose(0, 1)  # (B, T, D)
"""
ATTENTIONS = ("encoder.Attention.forward", "model.Attention.forward")
REWRITTEN = [
    Rewrite("encoder.AttentionPool.forward", ATTENTIONS, TORCHS_POOL),
    Rewrite("encoder.Attention.forward", ATTENTIONS[1:], TORCHS_ATTENTION),
    Rewrite(
        "shapes.sprites",
        ("paradigms.interpolate",),
        "return torch.lerp(paper, ink, alpha)",
        old="return alpha * ink + (1 - alpha) * paper",
    ),
    Rewrite(
        "paradigms.FlowMLP.forward",
        ("model.Connector.forward",),
        "for number in range(len(self.blocks)):\n        x = self.blocks[number](x, c)",
        old="for block in self.blocks:\n            x = block(x, c)",
    ),
]


def blanks_of(assignment: int) -> list[Blank]:
    return [b for b in BLANKS if b.assignment == assignment]


# ---------------------------------------------------------------- function bodies in a source


def find(source: str, name: str) -> ast.FunctionDef:
    """The function of a dotted name, `function` or `Class.function`. Raises ValueError."""
    node = ast.parse(source)
    for part in name.split("."):
        definitions = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        found = [n for n in definitions if n.name == part]
        if len(found) != 1:
            raise ValueError(f"{len(found)} definitions of {part} in {name}")
        node = found[0]
    return node


def body_lines(source: str, name: str) -> tuple[int, int]:
    """First and last line of what a function does, after signature and docstring.

    Counted from 0, the last excluded.
    """
    node = find(source, name)
    has_docstring = ast.get_docstring(node) is not None
    body = node.body[1:] if has_docstring else node.body
    assert body and body[0].lineno > node.lineno, f"{name} has no body on lines of its own"
    first = node.body[0].end_lineno if has_docstring else body[0].lineno - 1
    return first, node.end_lineno


def body_of(source: str, name: str) -> str:
    first, last = body_lines(source, name)
    return "".join(source.splitlines(keepends=True)[first:last])


def with_body(source: str, name: str, body: str) -> str:
    """The source with another body of one function."""
    lines = source.splitlines(keepends=True)
    first, last = body_lines(source, name)
    return "".join(lines[:first]) + body + "".join(lines[last:])


def cut(source: str, name: str, equation: str) -> str:
    """The source with a function's body taken out."""
    indent = " " * (find(source, name).col_offset + 4)
    line = f"{indent}raise NotImplementedError({json.dumps(equation)})"
    if len(line) > 100:
        line = f"{indent}raise NotImplementedError(\n{indent}    {json.dumps(equation)}\n{indent})"
    return with_body(source, name, f"{line}\n")


def rewrite(source: str, r: Rewrite) -> str:
    """The source with a function, or one line of it, written in another way."""
    indent = " " * (find(source, r.name.split(".", 1)[1]).col_offset + 4)
    function = r.name.split(".", 1)[1]
    new = textwrap.indent(r.new.strip(), indent) + "\n"
    if r.old:
        body = body_of(source, function)
        assert body.count(r.old) == 1, f"{r.name} has no line {r.old}"
        new = body.replace(r.old, r.new.replace("\n", f"\n{' ' * (len(indent) - 4)}"))
    return with_body(source, function, new)


# ---------------------------------------------------------------- the hand-out


def left_blank(assignment: int) -> list[Blank]:
    """The blanks of an assignment, and those of later ones; of the open one there are none."""
    return [b for b in BLANKS if assignment <= b.assignment]


def code_of(assignment: int) -> list[str]:
    """The files of the program that are handed out."""
    return CODE + (RUNS if assignment >= 4 else [])


def blanked(name: str, assignment: int) -> str:
    """A file of the program without the solutions that an assignment must not show."""
    source = (ROOT / name).read_text("utf-8")
    blanks = {b.name: b for b in left_blank(assignment)}
    module = name.removesuffix(".py")
    for b in blanks.values():
        if b.file == name:
            own = b.assignment == assignment
            text = b.equation if own else f"assignment {b.assignment}: {b.equation}"
            source = cut(source, b.function, text)
    for twin, (blank, what) in TWINS.items():
        if twin.split(".")[0] == module and blank in blanks:
            text = f"left out, since it is like {blank}: {what}"
            source = cut(source, twin.split(".", 1)[1], text)
    for r in REWRITTEN:
        is_here = r.name.split(".")[0] == module and r.name not in blanks
        if is_here and any(blank in blanks for blank in r.like):
            source = rewrite(source, r)
    return source


def make(assignment: int, out: Path, base: Path | None = None, fill: bool = False) -> None:
    """Writes the hand-out into the new folder `out`.

    fill: with nothing taken out, as the grader needs it.
    """
    out.mkdir(parents=True)
    for name in code_of(assignment):
        is_whole = fill or not name.endswith(".py")
        source = (ROOT / name).read_text("utf-8") if is_whole else blanked(name, assignment)
        (out / name).write_text(source, "utf-8")
    tests = TESTS + FIXTURES.get(assignment, [])
    if blanks_of(assignment):
        tests.append(test_file(assignment))
    for name in tests:
        copy(ROOT / "tests" / name, out / "tests" / name)
    table = [asdict(b) for b in blanks_of(assignment)]
    (out / "tests" / "blanks.json").write_text(json.dumps(table, indent=1) + "\n")
    copy(HERE / "handout_conftest.py", out / "conftest.py")
    copy(HERE / TITLES[assignment], out / "README.md")
    for name, handed_out in ((f"draw_{assignment}.py", "draw.py"), (f"{assignment}.png", "")):
        source = HERE / ("pictures" if name.endswith(".png") else "") / name
        if source.exists():
            copy(source, out / (handed_out or "expected.png"))
    if base:
        copy(base, out / "base.pt")


def copy(source: Path, target: Path) -> None:
    """Copies a file or a folder, without caches."""
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copyfile(source, target)


def bodies_of(assignment: int) -> list[Body]:
    """The bodies that the hand-out of an assignment must not show."""
    bodies = []
    for b in left_blank(assignment):
        source = (ROOT / b.file).read_text("utf-8")
        bodies.append(Body(b.name, body_of(source, b.function), find(source, b.function)))
    return bodies


def check() -> list[str]:
    """The places of all hand-outs that show a solution."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for assignment in TITLES:
            out = Path(folder) / str(assignment)
            make(assignment, out)
            leaks = find_leaks(out, bodies_of(assignment))
            found += [f"assignment {assignment}: {leak}" for leak in leaks]
    return found


def list_blanks() -> None:
    for b in BLANKS:
        print(f"{b.assignment}  {b.name:40} {b.points:2} points  {b.equation}")
        for test in b.tests:
            print(f"       {test}")


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("assignment", choices=[*map(str, TITLES), "list", "check"])
    parser.add_argument("out", nargs="?", type=Path, help="a new folder")
    parser.add_argument("--base", type=Path, help="a checkpoint to hand out with it, as base.pt")
    args = parser.parse_args()
    if args.assignment == "list":
        list_blanks()
        return 0
    if args.assignment == "check":
        found = check()
        print("\n".join(found) or "no hand-out shows the body of a blank, or a twin of it")
        return int(bool(found))
    if args.out is None or args.out.exists():
        parser.error(f"give a folder that does not exist yet, not {args.out}")
    if args.base and not args.base.is_file():
        parser.error(f"there is no checkpoint {args.base}")
    assignment = int(args.assignment)
    make(assignment, args.out, args.base)
    count = len(blanks_of(assignment))
    print(f"assignment {assignment} in {args.out}: {count} blanks, its text is README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
