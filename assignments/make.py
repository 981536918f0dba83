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
import re
import shutil
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# beside this file, also when it is imported from elsewhere
sys.path.insert(0, str(HERE))
from leaks import Body, find_leaks  # noqa: E402

MODULES = (
    "cli words encoder tokenizer figures images shapes captions folders weights pretrained "
    "paradigms data model feature_cache captioner muon recon_loss sample evaluate config engine "
    "train"
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
    """A function body to be written."""

    assignment: int
    name: str  # module.function or module.Class.function
    equation: str  # what the student is told is missing
    points: int = 10

    @property
    def file(self) -> str:
        return self.name.split(".")[0] + ".py"

    @property
    def function(self) -> str:
        """The name within the file: function or Class.function."""
        return self.name.split(".", 1)[1]

    @property
    def tests(self) -> list[str]:
        """What it has to pass, as file.py::function: the tests under the headline of its name."""
        file = test_file(self.assignment)
        source = (ROOT / "tests" / file).read_text("utf-8")
        section = re.split(rf"^# -+ {re.escape(self.name)}$", source, flags=re.M)[1]
        section = re.split(r"^# -+ ", section, flags=re.M)[0]
        functions = re.findall(r"^def (test_\w+)", section, flags=re.M)
        return [f"{file}::{function}" for function in functions]


def test_file(assignment: int) -> str:
    return f"test_assignments_{assignment}.py"


BLANKS = [
    Blank(1, "encoder.Attention.forward", "scaled dot-product attention, arXiv 1706.03762, eq. 1"),
    Blank(
        1,
        "encoder.ViT.position_embeddings",
        "position embeddings resized to another grid, arXiv 2010.11929, section 3.2",
    ),
    Blank(
        1, "encoder.ViT.forward", "from pixels to named tokens, arXiv 2010.11929, eq. 1 to 4", 20
    ),
    Blank(1, "pretrained.rename_keys", "strict loading: every tensor of the file has one name"),
    Blank(2, "model.Attention.forward", "multi-head attention, arXiv 1706.03762, section 3.2.2"),
    Blank(
        2,
        "model.prefix_mask",
        "attention mask: a causal prefix, an image that attends to the prefix and itself",
    ),
    Blank(2, "model.UnifiedModel.predict_image", "the image positions behind their prefix"),
    Blank(2, "model.UnifiedModel.text_logits", "p(word | prefix, words before it)"),
    Blank(
        2,
        "model.UnifiedModel.predict_image_cached",
        "the same with the prefix's keys and values read once",
    ),
    Blank(2, "recon_loss.text_loss", "next-word cross-entropy without <pad>"),
    Blank(3, "paradigms.interpolate", "x_t = t image + (1 - t) noise, arXiv 2209.03003, eq. 1"),
    Blank(
        3,
        "paradigms.velocity_squared_error",
        "the velocity's squared error from a predicted image, arXiv 2511.13720, eq. 6",
    ),
    Blank(3, "paradigms.Flow.loss", "E |v_pred - v|^2"),
    Blank(
        3,
        "recon_loss.drop_prefix",
        "dropped conditions, for classifier-free guidance, arXiv 2207.12598, algorithm 1",
    ),
    Blank(
        3,
        "paradigms.cfg_predict",
        "uncond + s (cond - uncond), with s = 1 + w of arXiv 2207.12598, eq. 6",
    ),
    Blank(
        3, "paradigms.euler_sample", "from noise to image in Euler steps, with resampled noise", 20
    ),
    Blank(
        4,
        "model.Connector.forward",
        "learned queries that attend to patch tokens and predict words, arXiv 2301.12597",
    ),
    Blank(
        4, "model.UnifiedModel.visual_prefix", "<bos>, then softmax(logits) @ wte, arXiv 2502.01341"
    ),
    Blank(4, "model.UnifiedModel.encode_visual_words", "visual words, with the encoder frozen"),
    Blank(4, "recon_loss.recon_loss", "-log p(image | its visual words), arXiv 2509.07295", 20),
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
    new: str  # its body, or the lines in place of `old`
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
        "for number in range(len(self.blocks)):\n    x = self.blocks[number](x, c)",
        old="for block in self.blocks:\n    x = block(x, c)",
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
    """The source with a function, or some lines of it, written in another way."""
    function = r.name.split(".", 1)[1]
    indent = " " * (find(source, function).col_offset + 4)
    body = textwrap.dedent(body_of(source, function))
    if r.old:
        assert body.count(r.old) == 1, f"{r.name} has no lines {r.old}"
        body = body.replace(r.old, r.new)
    else:
        body = r.new.lstrip()
    return with_body(source, function, textwrap.indent(body, indent))


# ---------------------------------------------------------------- the hand-out


def left_blank(assignment: int) -> list[Blank]:
    """The blanks of an assignment, and those of later ones; of the open one there are none."""
    return [b for b in BLANKS if assignment <= b.assignment]


def code_of(assignment: int) -> list[str]:
    """The files of the program that are handed out."""
    return CODE + (RUNS if assignment >= 4 else [])


def blanked(name: str, assignment: int, fill: bool = False) -> str:
    """A file of the program without the solutions that an assignment must not show.

    fill: with those that it asks for, as in an honest submission.
    """
    source = (ROOT / name).read_text("utf-8")
    blanks = {b.name: b for b in left_blank(assignment)}
    module = name.removesuffix(".py")
    for b in blanks.values():
        is_own = b.assignment == assignment
        if b.file == name and not (is_own and fill):
            text = b.equation if is_own else f"assignment {b.assignment}: {b.equation}"
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
    """Writes the hand-out into the new folder `out`. fill: its own blanks are filled in."""
    out.mkdir(parents=True)
    for name in code_of(assignment):
        if name.endswith(".py"):
            (out / name).write_text(blanked(name, assignment, fill), "utf-8")
        else:
            copy(ROOT / name, out / name)
    for name in TESTS + FIXTURES.get(assignment, []):
        copy(ROOT / "tests" / name, out / "tests" / name)
    blanks = blanks_of(assignment)
    if blanks:
        copy(ROOT / "tests" / test_file(assignment), out / "tests" / test_file(assignment))
        copy(HERE / f"draw_{assignment}.py", out / "draw.py")
        copy(HERE / "pictures" / f"{assignment}.png", out / "expected.png")
    table = [{"name": b.name, "equation": b.equation, "tests": b.tests} for b in blanks]
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


@cache
def solution(b: Blank) -> Body:
    source = (ROOT / b.file).read_text("utf-8")
    return Body(b.name, body_of(source, b.function), find(source, b.function))


def bodies_of(assignment: int) -> list[Body]:
    """The bodies that the hand-out of an assignment must not show."""
    return [solution(b) for b in left_blank(assignment)]


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
