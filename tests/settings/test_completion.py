"""Tab completion of ``dcdit`` in a real bash, as readline calls it."""

import os
import shutil
import subprocess
import sys

import pytest

from dcdit.__main__ import COMMANDS
from dcdit.settings.help import choices

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")

SCRIPT = """
eval "$(dcdit completion bash)"
COMP_WORDBREAKS=$2
COMP_LINE=$1 COMP_POINT=${#1}
_dcdit_complete
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers for a line that ends at the cursor."""
    folder = tmp_path_factory.mktemp("completion")
    program = folder / "bin" / "dcdit"
    program.parent.mkdir()
    program.write_text(f'#!{BASH}\nexec {sys.executable} -m dcdit "$@"\n')
    program.chmod(0o755)
    (folder / "runs" / "one").mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path)}

    def complete(line: str, breaks: str = " \t\n\"'><=;|&(:") -> list[str]:
        words = [BASH, "--norc", "-c", SCRIPT, "bash", line, breaks]
        result = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=folder, env=environment)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.split("\n")[:-1]

    return complete


def test_the_second_word_is_a_command(complete):
    assert complete("dcdit ") == [f"{name} " for name in COMMANDS]
    assert complete("dcdit ex") == ["explore ", "export ", "extract "]


def test_keys_and_choices_of_a_command_follow(complete):
    assert complete("dcdit sample sampler.cac") == ["sampler.cache="]
    assert set(complete("dcdit sample guidance.scale=2 sampler=")) == set(choices("sampler"))
    assert complete("dcdit train -m experiment=xl_n4_mod") == ["xl_n4_modern"]


def test_where_the_equals_sign_breaks_no_words_all_of_them_is_replaced(complete):
    assert complete("dcdit train experiment=xl_n4_mod", " \t\n") == ["experiment=xl_n4_modern"]


def test_status_takes_directories(complete):
    assert "runs/one/" in complete("dcdit status runs/o")
