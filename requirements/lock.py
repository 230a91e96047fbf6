"""Write requirements/lock.txt from what is installed: everything but rlhi itself and the packages of models.txt."""
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """\
# Exact versions that the tests and the demo were run with; `make lock` writes this file.
# torch is the ordinary release: on machines without a GPU pip may find a CPU build of the same version.
"""

names = {line.split("==")[0].strip().lower() for line in (HERE / "models.txt").read_text().splitlines() if "==" in line}
frozen = subprocess.run([sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable"],
                        check=True, capture_output=True, text=True).stdout.splitlines()
kept = [line.split("+")[0] for line in frozen
        if "==" in line and line.split("==")[0].lower().replace("_", "-") not in names | {"pip", "rlhi"}]
(HERE / "lock.txt").write_text(HEAD + "\n".join(kept) + "\n")
print(f"{len(kept)} packages in {HERE / 'lock.txt'}")
