"""Asks for known vulnerabilities of the pinned versions, through pip-audit: `make audit`.

Advisories come over the network. Without one this ends within seconds, in one line and with exit status 2, so that nobody takes an
audit that did not happen for one that found nothing; 1 means that something was found.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-audit"  # pip-audit brings packages of its own, which are no business of the environment that is audited
SERVICES = {"pypi": "https://pypi.org/pypi/pip/json", "osv": "https://api.osv.dev/v1/vulns/OSV-2020-111"}
SECONDS = 3.0
LONGEST = 300.0


def reachable(address: str) -> bool:
    """Whether an address answers in time, by whatever proxy is set; name servers that don't answer count as no."""
    probe = f"import urllib.request; urllib.request.urlopen({address!r}, timeout={SECONDS}).read(1)"
    try:
        return subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=SECONDS + 1).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def undone(why: str) -> int:
    """Say that no audit took place."""
    print(f"audit: not done: {why}\n  try: make audit where advisories can be asked for", file=sys.stderr)
    return 2


def main() -> int:
    """Audit the versions of constraints.txt."""
    service = next((name for name, address in SERVICES.items() if reachable(address)), None)
    if service is None:
        return undone(f"none of {', '.join(SERVICES)} answers")
    python = HOME / "bin" / "python"
    command = [str(python), "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--timeout=10"]
    try:
        if not (HOME / "bin" / "pip-audit").exists():
            venv.create(HOME, with_pip=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", "pip-audit>=2.9,<3"], check=True, timeout=LONGEST)
        code = subprocess.run(
            [*command, "--vulnerability-service", service, "-r", str(ROOT / "constraints.txt")], timeout=LONGEST
        ).returncode
    except subprocess.CalledProcessError:
        return undone("pip-audit can't be installed")
    except subprocess.TimeoutExpired:
        return undone(f"no answer within {LONGEST:g} s")
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
