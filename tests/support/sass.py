"""What the compile gate reads in machine code."""

import re


def overwritten_in_flight(sass: str) -> list[str]:
    """Instructions that write a register from which a wgmma still in flight reads operand A.

    ptxas before 13.3 may allot such registers anew. A wgmma group ends with gsb0 and is in flight
    until a DEPBAR leaves fewer behind it; nothing is looked at across branches.
    """
    found, open_group, groups = [], set(), []
    for line in sass.splitlines():
        code = re.search(r"\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)\s*(.*?)\s*$", line)
        if code is None:
            continue
        name, operands = code[1], re.split(r",\s*", code[2])
        written = [x for x in operands if not re.fullmatch(r"!?U?P(\d|T)", x)][:1]
        into = re.fullmatch(r"R(\d+)(\.\w+)*", written[0]) if written else None
        if into and not name.startswith("BAR"):
            n = re.match(r"[HI]GMMA\.64x(\d+)x", name)
            width = int(n[1]) // 2 if n else 4 if re.search(r"\.(4|128)$", name) else 1
            width = 2 if re.search(r"WIDE|\.64$", name) else width
            registers = set(range(int(into[1]), int(into[1]) + width))
            if registers & open_group.union(*groups):
                found.append(line.strip())
        if re.match(r"[HI]GMMA", name):
            if a := re.fullmatch(r"R(\d+)", operands[1]):
                open_group |= set(range(int(a[1]), int(a[1]) + 4))
            if "gsb0" in operands:
                groups.append(open_group)
                open_group = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(operands[-1], 16)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
    return found
