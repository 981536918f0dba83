"""What a blank's body must not do: reach out of its arguments, its file's names, and tensors.

A blank is arithmetic on tensors. Files, processes, modules but for a few, Python's insides and
names of others that are assigned to are none of it; a body that holds such a line is not run. This
is the first of several walls, see grade.py: what passes here is still confined (sandbox.py), and
its values are compared outside its process (probes.py).
"""

import ast
import builtins
import importlib.util
import os
import sys
from functools import cache

from make import MODULES

# Modules that a body may import, and read names of.
ALLOWED_IMPORTS = {"torch", "torch.nn", "torch.nn.functional", "torch.linalg", "torch.special"}
ALLOWED_IMPORTS |= {"math", "re", "einops", "functools", "itertools", "collections", "typing"}
TORCH_MODULES = {"nn", "functional", "special", "linalg", "fft", "amp", "autograd", "compiler"}
TORCH_MODULES |= {"cuda", "func"}
# Functions and classes of torch whose names are also those of modules.
NO_MODULES = {"select", "chunk", "trace"}
TORCH_DANGEROUS = {"load", "save", "from_file", "ops", "classes", "compile", "set_default_dtype"}
TORCH_DANGEROUS |= {"set_default_device", "set_default_tensor_type"}
BUILTINS = """
abs all any bool bytes callable chr complex dict divmod enumerate filter float format frozenset hash
id int isinstance issubclass iter len list map max min next ord pow print range repr reversed round
set slice sorted str sum super tuple zip Ellipsis NotImplemented
"""
# Attributes that lead to frames, code or files.
ATTRIBUTES = """
gi_frame gi_code gi_yieldfrom cr_frame cr_code ag_frame ag_code tb_frame tb_next f_back f_locals
f_globals f_builtins f_code func_globals mro tofile dump dumps save storage untyped_storage data_ptr
share_memory_ system popen
"""
STATEMENTS = {
    ast.ClassDef: "defines a class; tests can be fooled by one",
    ast.Global: "writes a global name",
    ast.Match: "matches patterns; use if",
    ast.AsyncFunctionDef: "is asynchronous",
    ast.Await: "is asynchronous",
}


@cache
def module_names() -> frozenset[str]:
    """Names of modules that hide behind a dot, as in torch.os or torch.utils."""
    names = set(sys.stdlib_module_names) | {"numpy", "np", "torch", "einops", "builtins"}
    spec = importlib.util.find_spec("torch")
    for folder in spec.submodule_search_locations if spec else ():
        names |= {name.partition(".")[0] for name in os.listdir(folder)}
    return frozenset(names - NO_MODULES)


def imported_names(tree: ast.Module) -> dict[str, str]:
    """{name in the file: the module that it is, or `module:name` of what it is taken from}."""
    found = {}
    for node in tree.body:
        found |= names_of_import(node)
    return found


def names_of_import(node: ast.AST) -> dict[str, str]:
    found = {}
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            found[alias.asname or top] = alias.name if alias.asname else top
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            origin = whole if whole in ALLOWED_IMPORTS else f"{node.module}:{alias.name}"
            found[alias.asname or alias.name] = origin
    return found


def suspicious(nodes: list[ast.AST], imports: dict[str, str], ours: set[str]) -> list[str]:
    """The lines of some code that no blank needs, each with the reason.

    imports: names that the file imports, as imported_names; ours: its other global names.
    """
    audit = Audit(imports, ours)
    for node in nodes:
        audit.add_locals(node)
    for node in nodes:
        audit.visit(node)
    return sorted(set(audit.found), key=audit.found.index)


class Audit(ast.NodeVisitor):
    def __init__(self, imports: dict[str, str], ours: set[str]):
        self.imports = dict(imports)
        self.ours = ours
        self.locals = set()
        self.found = []

    def add_locals(self, node: ast.AST) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                self.locals.add(part.id)
            elif isinstance(part, ast.arg):
                self.locals.add(part.arg)
            elif isinstance(part, ast.FunctionDef | ast.ExceptHandler) and part.name:
                self.locals.add(part.name)
            elif isinstance(part, ast.Import | ast.ImportFrom):
                self.imports |= names_of_import(part)
        # a name that is a module anywhere is one everywhere
        self.locals -= set(self.imports)

    def flag(self, node: ast.AST, why: str) -> None:
        code = ast.unparse(node).partition("\n")[0][:80]
        self.found.append(f"line {node.lineno}: `{code}` {why}")

    def visit(self, node: ast.AST) -> None:
        for kind, why in STATEMENTS.items():
            if isinstance(node, kind):
                self.flag(node, why)
        super().visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name not in ALLOWED_IMPORTS:
                self.flag(node, f"imports {alias.name}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not is_allowed(str(node.module)):
            self.flag(node, f"imports from {node.module}")
            return
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if alias.name == "*":
                self.flag(node, "imports all names")
            elif whole not in ALLOWED_IMPORTS:
                self.check_path(node, str(node.module), [alias.name])

    def visit_Name(self, node: ast.Name) -> None:
        name = node.id
        if name.startswith("__"):
            self.flag(node, "is an inside of Python")
        elif name in self.locals:
            return
        elif name in self.imports:
            self.check_imported(node, name)
        elif isinstance(node.ctx, ast.Load) and name not in self.ours and is_builtin(name):
            self.flag(node, f"uses the builtin {name}")

    def check_imported(self, node: ast.Name, name: str) -> None:
        module, _, taken = self.imports[name].partition(":")
        if isinstance(node.ctx, ast.Store):
            self.flag(node, f"gives {name} another meaning")
        elif not taken:
            self.flag(node, "hands a module around" if is_allowed(module) else f"uses {module}")
        elif not is_allowed(module):
            self.flag(node, f"uses {module}.{taken}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts = []
        root = node
        while isinstance(root, ast.Attribute):
            parts.insert(0, root.attr)
            root = root.value
        is_ours = isinstance(root, ast.Name) and root.id not in self.locals
        if isinstance(node.ctx, ast.Store | ast.Del) and not self.is_local(root):
            self.flag(node, "is assigned to, and is not the function's own")
        is_module = is_ours and root.id in self.imports and ":" not in self.imports[root.id]
        for part in parts:
            is_inside = part.startswith("_" if is_module else "__")
            if is_inside or part in ATTRIBUTES.split():
                self.flag(node, f"reads the inside {part}")
        if is_module:
            self.check_path(node, self.imports[root.id], parts)
        else:
            self.visit(root)

    def check_path(self, node: ast.AST, module: str, parts: list[str]) -> None:
        """Names read of a module: each on the way has to be one that tensors need."""
        if not is_allowed(module):
            self.flag(node, f"uses {module}")
            return
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1
            is_open = module.startswith("torch") and part in TORCH_MODULES
            if is_open and is_last:
                self.flag(node, "hands a module around")
            elif part in TORCH_DANGEROUS or (not is_open and part in module_names()):
                self.flag(node, f"uses {part} of {module}")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Store | ast.Del) and not self.is_local(node.value):
            self.flag(node, "is assigned to, and is not the function's own")
        self.generic_visit(node)

    def is_local(self, node: ast.AST) -> bool:
        """Whether what is assigned to hangs on an argument or a local name."""
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        if isinstance(node, ast.Call):
            return not (isinstance(node.func, ast.Name) and node.func.id == "type")
        return isinstance(node, ast.Name) and node.id in self.locals

    def visit_Call(self, node: ast.Call) -> None:
        """getattr and hasattr with a name in quotes are attributes; type(x) is a question."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "hasattr") and len(node.args) >= 2:
            attribute = node.args[1]
            if isinstance(attribute, ast.Constant) and isinstance(attribute.value, str):
                read = ast.Attribute(node.args[0], attribute.value, ast.Load())
                self.visit(ast.copy_location(read, node))
                for argument in node.args[2:]:
                    self.visit(argument)
                return
        if name == "type" and len(node.args) == 1 and not node.keywords:
            self.visit(node.args[0])
            return
        self.generic_visit(node)


def is_builtin(name: str) -> bool:
    """Whether a name is a builtin that a body has no use for."""
    known = getattr(builtins, name, None)
    is_error = isinstance(known, type) and issubclass(known, Exception)
    return known is not None and not is_error and name not in BUILTINS.split()


def is_allowed(module: str) -> bool:
    """A few libraries, and the repository's own files."""
    return module in ALLOWED_IMPORTS or module in MODULES.split()
