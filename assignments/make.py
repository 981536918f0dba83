"""Make an assignment: the real code with some function bodies taken out, their tests, and a text.

    python assignments/make.py 2 OUT                          # assignment 2, in the new folder OUT
    python assignments/make.py 4 OUT --base out/pretrain.pt   # with a trained base for RecA
    python assignments/make.py list                           # every blank, its equation, its tests

A blank is a function of the real code, by file and name. Its signature and docstring stay; its
body, comments included, becomes `raise NotImplementedError("<name of the equation>")`. No marker
stands in the source: `ast` finds the lines.
"""

import argparse
import ast
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODULES = (
    "words encoder tokenizer figures images shapes folders hub pretrained paradigms data model "
    "feature_cache captioner recon_loss sample evaluate config engine train variants experiments"
)
CODE = [f"{name}.py" for name in MODULES.split()]
CODE += ["requirements.txt", "pyproject.toml", "LICENSE"]

# What each hand-out holds of tests/, beside SHARED_TESTS.
SHARED_TESTS = ["conftest.py", "small.py", "test_assignments_blanks.py"]
ENCODER_TESTS = ["test_encoder.py", "test_pretrained.py", "make_encoder_fixtures.py", "fixtures"]
FLOW_TESTS = ["test_model.py", "test_paradigms.py", "test_recon_loss.py", "test_sample.py"]
TESTS = {
    1: ENCODER_TESTS,
    2: ["test_model.py"],
    3: FLOW_TESTS,
    4: ["test_model.py", "test_recon_loss.py"],
    5: FLOW_TESTS,
}
TITLES = {
    1: "1_encoder.md",
    2: "2_transformer.md",
    3: "3_flow.md",
    4: "4_reca.md",
    5: "5_open.md",
}


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


BLANKS = [
    Blank(
        1,
        "encoder.Attention.forward",
        "scaled dot-product attention, arXiv 1706.03762, eq. 1",
        (
            "test_pretrained.py::test_fixture_of_the_real_library",
            "test_assignments_blanks.py::test_encoder_attention_is_torchs",
        ),
    ),
    Blank(
        1,
        "encoder.ViT.forward",
        "from pixels to named tokens, arXiv 2010.11929, eq. 1 to 4",
        (
            "test_pretrained.py::test_fixture_of_the_real_library",
            "test_encoder.py::test_every_parameter_learns",
            "test_encoder.py::test_a_patch_changes_with_its_own_pixels_first",
            "test_encoder.py::test_native_size_that_the_patch_does_not_divide",
            "test_encoder.py::test_images_are_checked_at_the_boundary",
            "test_assignments_blanks.py::test_without_blocks_the_encoder_is_its_patch_embedding",
        ),
        points=20,
    ),
    Blank(
        1,
        "encoder.ViT.position_embeddings",
        "position embeddings resized to another grid, arXiv 2010.11929, section 3.2",
        (
            "test_encoder.py::test_dinov2_resizes_with_the_offset",
            "test_pretrained.py::test_fixture_of_the_real_library",
            "test_assignments_blanks.py::test_positions_resize_as_the_publisher_does",
        ),
    ),
    Blank(
        1,
        "pretrained.rename_keys",
        "strict loading: every tensor of the file has one name",
        (
            "test_pretrained.py::test_extra_tensors_are_named",
            "test_pretrained.py::test_two_layouts_in_one_file_are_refused",
            "test_pretrained.py::test_loaded_encoder_is_frozen_and_cast",
            "test_assignments_blanks.py::test_rename_keys_is_one_to_one",
        ),
    ),
    Blank(
        2,
        "model.Attention.forward",
        "multi-head attention, arXiv 1706.03762, section 3.2.2",
        (
            "test_assignments_blanks.py::test_attention_is_torchs_multi_head_attention",
            "test_assignments_blanks.py::test_cross_attention_reads_its_context",
            "test_model.py::test_cached_image_equals_uncached",
        ),
    ),
    Blank(
        2,
        "model.prefix_mask",
        "attention mask: a causal prefix, an image that attends to the prefix and itself",
        (
            "test_model.py::test_masks_of_the_image_by_gradient",
            "test_assignments_blanks.py::test_prefix_mask_row_by_row",
        ),
    ),
    Blank(
        2,
        "model.UnifiedModel.predict_image",
        "the image positions behind their prefix",
        (
            "test_model.py::test_masks_of_the_image_by_gradient",
            "test_model.py::test_cached_image_equals_uncached",
            "test_model.py::test_repeats_that_share_a_prefix_equal_repeats_apart",
            "test_assignments_blanks.py::test_image_positions_are_added_once",
        ),
    ),
    Blank(
        2,
        "model.UnifiedModel.text_logits",
        "p(word | prefix, words before it)",
        (
            "test_model.py::test_no_future_leak_in_text",
            "test_model.py::test_cached_text_equals_uncached",
            "test_assignments_blanks.py::test_text_logits_start_at_the_last_word_of_the_prefix",
        ),
    ),
    Blank(
        2,
        "model.UnifiedModel.predict_image_cached",
        "the same with the prefix's keys and values read once",
        ("test_model.py::test_cached_image_equals_uncached",),
    ),
    Blank(
        3,
        "paradigms.interpolate",
        "x_t = t image + (1 - t) noise, arXiv 2209.03003, eq. 1",
        ("test_paradigms.py::test_interpolation_endpoints_and_velocity_by_jvp",),
    ),
    Blank(
        3,
        "paradigms.velocity_squared_error",
        "the velocity's squared error from a predicted image, arXiv 2511.13720, eq. 6",
        (
            "test_paradigms.py::test_velocity_squared_error_is_that_of_the_velocity",
            "test_assignments_blanks.py::test_velocity_squared_error_by_hand",
        ),
    ),
    Blank(
        3,
        "paradigms.Flow.loss",
        "E |v_pred - v|^2",
        (
            "test_paradigms.py::test_flow_loss_is_zero_for_the_image_and_exact_for_an_offset",
            "test_assignments_blanks.py::test_flow_loss_shows_the_model_noised_patches_alone",
        ),
    ),
    Blank(
        3,
        "recon_loss.drop_prefix",
        "dropped conditions, for classifier-free guidance, arXiv 2207.12598, algorithm 1",
        ("test_recon_loss.py::test_dropped_conditions_are_the_empty_caption",),
    ),
    Blank(
        3,
        "paradigms.cfg_predict",
        "uncond + s (cond - uncond), arXiv 2207.12598, eq. 6",
        ("test_assignments_blanks.py::test_guidance_goes_from_none_to_the_condition_and_beyond",),
    ),
    Blank(
        3,
        "paradigms.euler_sample",
        "from noise to image in Euler steps, with resampled noise",
        (
            "test_paradigms.py::test_an_exact_model_recovers_the_data_in_any_number_of_steps",
            "test_paradigms.py::test_without_resampling_the_steps_are_eulers",
            "test_paradigms.py::test_resampled_noise_keeps_its_variance",
        ),
        points=20,
    ),
    Blank(
        4,
        "model.Connector.forward",
        "learned queries that attend to patch tokens and predict words, arXiv 2301.12597",
        ("test_assignments_blanks.py::test_connector_reads_its_patches",),
    ),
    Blank(
        4,
        "model.UnifiedModel.visual_prefix",
        "<bos>, then softmax(logits) @ wte, arXiv 2502.01341",
        (
            "test_model.py::test_one_hot_visual_words_are_the_words",
            "test_assignments_blanks.py::test_visual_words_are_expected_embeddings",
        ),
    ),
    Blank(
        4,
        "model.UnifiedModel.encode_visual_words",
        "visual words, with the encoder frozen",
        ("test_assignments_blanks.py::test_visual_words_train_the_connector_never_the_encoder",),
    ),
    Blank(
        4,
        "recon_loss.recon_loss",
        "-log p(image | its visual words), arXiv 2509.07295",
        (
            "test_recon_loss.py::test_recon_is_t2i_with_another_prefix",
            "test_recon_loss.py::test_reca_trains_the_transformer_and_not_what_makes_the_condition",
        ),
        points=20,
    ),
    Blank(
        4,
        "recon_loss.text_loss",
        "next-word cross-entropy without <pad>",
        ("test_recon_loss.py::test_text_loss_predicts_each_word_from_those_before_and_no_padding",),
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
    return with_body(source, name, f"{indent}raise NotImplementedError({json.dumps(equation)})\n")


# ---------------------------------------------------------------- the hand-out


def make(assignment: int, out: Path, base: Path | None = None, fill: bool = False) -> None:
    """Writes the hand-out into the new folder `out`.

    fill: with nothing taken out, as the grader needs it.
    """
    out.mkdir(parents=True)
    blanks = blanks_of(assignment)
    for name in CODE:
        source = (ROOT / name).read_text("utf-8")
        for b in blanks:
            if b.file == name and not fill:
                source = cut(source, b.function, b.equation)
        (out / name).write_text(source, "utf-8")
    for name in SHARED_TESTS + TESTS[assignment]:
        copy(ROOT / "tests" / name, out / "tests" / name)
    table = [asdict(b) for b in blanks]
    (out / "tests" / "blanks.json").write_text(json.dumps(table, indent=1) + "\n")
    copy(HERE / "handout_conftest.py", out / "conftest.py")
    copy(HERE / TITLES[assignment], out / "README.md")
    if base:
        copy(base, out / "base.pt")


def copy(source: Path, target: Path) -> None:
    """Copies a file or a folder, without caches."""
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copyfile(source, target)


def list_blanks() -> None:
    for b in BLANKS:
        print(f"{b.assignment}  {b.name:40} {b.points:2} points  {b.equation}")
        for test in b.tests:
            print(f"       {test}")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("assignment", choices=[*map(str, TITLES), "list"])
    parser.add_argument("out", nargs="?", type=Path, help="a new folder")
    parser.add_argument("--base", type=Path, help="a checkpoint to hand out with it, as base.pt")
    args = parser.parse_args()
    if args.assignment == "list":
        list_blanks()
        return
    if args.out is None or args.out.exists():
        parser.error(f"give a folder that does not exist yet, not {args.out}")
    if args.base and not args.base.is_file():
        parser.error(f"there is no checkpoint {args.base}")
    assignment = int(args.assignment)
    make(assignment, args.out, args.base)
    count = len(blanks_of(assignment))
    print(f"assignment {assignment} in {args.out}: {count} blanks, its text is README.md")


if __name__ == "__main__":
    sys.exit(main())
