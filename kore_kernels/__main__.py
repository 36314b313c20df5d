"""``python -m kore_kernels``: what runs here, why the rest does not, and a test of each backend beside float64.

Ends with status 1 if a backend that can be used here gives wrong numbers.
"""

import sys

from kore_kernels.doctor import examine


def main() -> int:
    findings = examine()
    for finding in findings:
        print(f"{finding.state:5} {finding.name:28} {finding.detail}")
    wrong = [finding.name for finding in findings if finding.state == "wrong"]
    print(f"\nnot to be trusted here: {', '.join(wrong)}" if wrong else "\nwhat runs here is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
