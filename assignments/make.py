"""Make an assignment: the real code with some function bodies taken out, their tests, and a text.

    python assignments/make.py 2 OUT                            # assignment 2, to be handed out, in the new folder OUT
    python assignments/make.py 4 OUT --base out/pretrain.pt     # with a trained base to start RecA from
    python assignments/make.py list                             # every blank, its equation, its tests

A blank is a function of the real code, by file and name. Its signature and docstring stay; its body, comments included, becomes
`raise NotImplementedError("<name of the equation>")`. No marker stands in the source: `ast` finds the lines.
"""
import argparse
import ast
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ["data.py", "encoder.py", "model.py", "recon_loss.py", "sample.py", "evaluate.py", "train.py", "requirements.txt", "LICENSE"]
TESTS = {  # what each hand-out holds of tests/; test_model.py holds the small model that the others use
    1: ["test_encoder.py", "make_encoder_fixtures.py", "fixtures"],
    2: ["test_model.py"],
    3: ["test_model.py", "test_recon_loss.py", "test_sample.py"],
    4: ["test_model.py", "test_recon_loss.py"],
    5: ["test_model.py", "test_recon_loss.py", "test_sample.py"],
}
TITLES = {1: "1_encoder.md", 2: "2_transformer.md", 3: "3_flow.md", 4: "4_reca.md", 5: "5_open.md"}


@dataclass(frozen=True)
class Blank:
    """A function body to be written, and the tests, `file.py::function`, that it has to pass."""
    assignment: int
    name: str        # module.function or module.Class.function
    equation: str    # what the student is told is missing
    tests: tuple[str, ...]
    points: int = 10

    @property
    def file(self) -> str:
        return self.name.split(".")[0] + ".py"


def blank(assignment: int, name: str, equation: str, tests: str, points: int = 10) -> Blank:
    """tests: words `file: function function ... file: ...`, without `test_` and `.py`."""
    found, file = [], ""
    for word in tests.split():
        if word.endswith(":"):
            file = f"test_{word[:-1]}.py"
        else:
            found.append(f"{file}::test_{word}")
    return Blank(assignment, name, equation, tuple(found), points)


BLANKS = [
    blank(1, "encoder.Attention.forward", "scaled dot-product attention, arXiv 1706.03762, eq. 1",
          "encoder: fixture_of_the_real_library assignments_blanks: encoder_attention_is_torchs"),
    blank(1, "encoder.ViT.forward", "from pixels to named tokens, arXiv 2010.11929, eq. 1 to 4",
          "encoder: fixture_of_the_real_library every_parameter_learns a_patch_changes_with_its_own_pixels_first "
          "native_size_that_the_patch_does_not_divide images_are_checked_at_the_boundary assignments_blanks: without_blocks_the_encoder_is_its_patch_embedding", 20),
    blank(1, "encoder.ViT.position_embeddings", "position embeddings resized to another grid, arXiv 2010.11929, section 3.2",
          "encoder: dinov2_resizes_with_the_offset fixture_of_the_real_library assignments_blanks: positions_resize_as_the_publisher_does"),
    blank(1, "encoder.rename", "strict loading: every tensor of the file has one name",
          "encoder: extra_tensors_are_named two_layouts_in_one_file_are_refused loaded_encoder_is_frozen_and_cast assignments_blanks: rename_is_one_to_one"),
    blank(2, "model.Attention.forward", "multi-head attention, arXiv 1706.03762, section 3.2.2",
          "assignments_blanks: attention_is_torchs_multi_head_attention cross_attention_reads_its_context model: cached_image_equals_uncached"),
    blank(2, "model.prefix_mask", "who sees whom: causal prefix, image sees prefix and itself",
          "model: masks_of_the_image_by_gradient assignments_blanks: prefix_mask_row_by_row"),
    blank(2, "model.UnifiedModel.predict_image", "the image positions behind their prefix",
          "model: masks_of_the_image_by_gradient cached_image_equals_uncached draws_that_share_a_prefix_equal_draws_apart assignments_blanks: image_positions_are_added_once"),
    blank(2, "model.UnifiedModel.text_logits", "p(word | prefix, words before it)",
          "model: no_future_leak_in_text cached_text_equals_uncached assignments_blanks: text_logits_start_at_the_last_word_of_the_prefix"),
    blank(2, "model.UnifiedModel.predict_image_cached", "the same with the prefix's keys and values read once",
          "model: cached_image_equals_uncached"),
    blank(3, "recon_loss.interpolate", "x_t = t image + (1 - t) noise, arXiv 2209.03003, eq. 1",
          "recon_loss: interpolation_endpoints_and_velocity_by_jvp"),
    blank(3, "recon_loss.velocity_error", "the velocity's squared error from a predicted image, arXiv 2511.13720, eq. 6",
          "recon_loss: velocity_error_is_the_squared_error_of_the_velocity assignments_blanks: velocity_error_by_hand"),
    blank(3, "recon_loss.flow_loss", "E |v_pred - v|^2",
          "recon_loss: flow_loss_is_zero_for_the_image_and_exact_for_an_offset assignments_blanks: flow_loss_shows_the_model_what_it_says"),
    blank(3, "recon_loss.drop_prefix", "dropped conditions, for classifier-free guidance, arXiv 2207.12598, algorithm 1",
          "recon_loss: dropped_conditions_are_the_empty_caption"),
    blank(3, "sample.guided", "uncond + s (cond - uncond), arXiv 2207.12598, eq. 6",
          "assignments_blanks: guidance_goes_from_none_to_the_condition_and_beyond"),
    blank(3, "sample.denoise", "from noise to image in Euler's steps, with renewed noise",
          "sample: an_exact_model_recovers_the_data_in_any_number_of_steps without_renewal_the_steps_are_eulers renewed_noise_keeps_its_size", 20),
    blank(4, "model.Connector.forward", "learned queries that look at patch tokens and say words, arXiv 2301.12597",
          "assignments_blanks: connector_reads_its_patches"),
    blank(4, "model.UnifiedModel.visual_prefix", "<bos>, then softmax(logits) @ wte, arXiv 2502.01341",
          "model: one_hot_visual_words_are_the_words assignments_blanks: visual_words_are_expected_embeddings"),
    blank(4, "recon_loss.see", "visual words, with the encoder frozen",
          "assignments_blanks: seeing_trains_the_connector_and_never_the_encoder"),
    blank(4, "recon_loss.recon_loss", "-log p(image | its visual words), arXiv 2509.07295",
          "recon_loss: recon_is_t2i_with_another_prefix reca_trains_the_transformer_and_not_what_makes_the_condition", 20),
    blank(4, "recon_loss.text_loss", "next-word cross-entropy without <pad>",
          "recon_loss: text_loss_predicts_each_word_from_those_before_and_no_padding"),
]


def blanks_of(assignment: int) -> list[Blank]:
    return [b for b in BLANKS if b.assignment == assignment]


def find(source: str, name: str) -> ast.FunctionDef:
    """The function of a dotted name, `function` or `Class.function`. Raises ValueError."""
    node = ast.parse(source)
    for part in name.split("."):
        found = [n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part]
        if len(found) != 1:
            raise ValueError(f"{len(found)} definitions of {part} in {name}")
        node = found[0]
    return node


def body_lines(source: str, name: str) -> tuple[int, int]:
    """First and last line, from 0, the last excluded, of what a function does: after signature and docstring."""
    node = find(source, name)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    assert body and body[0].lineno > node.lineno, f"{name} has no body on lines of its own"
    first = node.body[0].end_lineno if body is not node.body else node.body[0].lineno - 1
    return first, node.end_lineno


def body_of(source: str, name: str) -> str:
    first, last = body_lines(source, name)
    return "".join(source.splitlines(keepends=True)[first:last])


def with_body(source: str, name: str, body: str) -> str:
    """The source with another body of one function."""
    lines, (first, last) = source.splitlines(keepends=True), body_lines(source, name)
    return "".join(lines[:first]) + body + "".join(lines[last:])


def cut(source: str, name: str, equation: str) -> str:
    """The source with a function's body taken out."""
    indent = " " * (find(source, name).col_offset + 4)
    return with_body(source, name, f"{indent}raise NotImplementedError({json.dumps(equation)})\n")


def local(name: str) -> str:
    """module.Class.function -> Class.function"""
    return name.split(".", 1)[1]


def make(assignment: int, out: Path, base: Path | None = None, fill: bool = False) -> None:
    """Writes the hand-out into the new folder `out`. fill: with nothing taken out, as the grader needs it."""
    out.mkdir(parents=True)
    cuts = [] if fill else blanks_of(assignment)
    for name in CODE:
        source = (ROOT / name).read_text("utf-8")
        for b in cuts:
            if b.file == name:
                source = cut(source, local(b.name), b.equation)
        (out / name).write_text(source, "utf-8")
    (out / "tests").mkdir()
    for name in TESTS[assignment] + ["test_assignments_blanks.py"]:
        if (ROOT / "tests" / name).is_dir():
            shutil.copytree(ROOT / "tests" / name, out / "tests" / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copyfile(ROOT / "tests" / name, out / "tests" / name)
    here = Path(__file__).parent
    shutil.copyfile(here / "handout_conftest.py", out / "tests" / "conftest.py")
    table = [dict(name=b.name, equation=b.equation, points=b.points, tests=b.tests) for b in blanks_of(assignment)]
    (out / "tests" / "blanks.json").write_text(json.dumps(table, indent=1) + "\n")
    shutil.copyfile(here / TITLES[assignment], out / "README.md")
    if base:
        shutil.copyfile(base, out / "base.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assignment", choices=[*map(str, TITLES), "list"])
    parser.add_argument("out", nargs="?", type=Path, help="a new folder")
    parser.add_argument("--base", type=Path, help="a checkpoint of the base to hand out with it, as base.pt")
    args = parser.parse_args()
    if args.assignment == "list":
        for b in BLANKS:
            print(f"{b.assignment}  {b.name:38} {b.points:2} points  {b.equation}\n   {' '.join(b.tests)}")
        return
    if args.out is None or args.out.exists():
        parser.error(f"give a folder that does not exist yet, not {args.out}")
    if args.base and not args.base.is_file():
        parser.error(f"there is no checkpoint {args.base}")
    make(int(args.assignment), args.out, args.base)
    print(f"assignment {args.assignment} in {args.out}: {len(blanks_of(int(args.assignment)))} blanks, its text is README.md")


if __name__ == "__main__":
    sys.exit(main())
