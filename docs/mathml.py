"""Formulas of the site as MathML, made when it is built: browsers need no script and no network.

pymdownx.arithmatex finds `$...$` and `$$...$$`, which GitHub shows too; what it found is translated
here.
"""

from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor


class _Translation(Treeprocessor):
    def run(self, root: Element) -> None:
        for parent in list(root.iter()):
            for i, child in enumerate(parent):
                if child.get("class") == "arithmatex":
                    is_block = child.tag == "div"
                    tex = (child.text or "").strip()[2:-2]  # between \( and \), or \[ and \]
                    formula = convert_to_element(tex, display="block" if is_block else "inline")
                    formula.tail = child.tail
                    parent[i] = formula


class MathML(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Translation(md), "mathml", 0)  # after the inline patterns


def makeExtension(**options: object) -> MathML:
    return MathML(**options)
