"""Checks hosts, ranks and links before a program starts: `python -m launcher ... --preflight [-- PROGRAM]`.

start.py runs the checks as a job of its own and rank.py is one rank of it; hub.py gives orders to all ranks over TCP,
without MPI, as links may be broken; member.py carries them out; conduct.py is the order of the checks.
schedule.py says who tries whom, pairs.py tries it, collectives.py times what all ranks do together, resources.py and
gpu.py read what a host has; fit.py and judge.py make figures into verdicts, report.py shows them.
Its tables: CHECKS and PACES (resources.py), RULES (gpu.py), TRANSPORTS (collectives.py); another check is a row.

The file (--preflight-file) is one JSON object; bytes, seconds, bytes per second throughout:

    version      1
    complete     false where the job ended before all checks were made
    hosts        [{name, ranks: [0, 1], cores, free_memory_bytes, disk_bytes, tmp_bytes, shm_bytes, clock_offset_s,
                 clock_doubt_s, gpus: [fields of nvidia-smi], gpu_note}]
    ranks        [{rank, host, pid, address, interface, interface_bytes_per_s (0 = it does not say), hash_bytes_per_s,
                 copy_bytes_per_s}]
    links        [{ranks: [0, 1], hosts: [a, b], called (the rank that was connected to), address, cause ("" = they
                 connect), latency_s, bytes_per_s (of the slower way; null = not measured), up_bytes_per_s (from the
                 first to the second), down_bytes_per_s}]
                 Those that were only tried, and connect, are not listed.
    links_tried  number
    collectives  [{kind, backend, world, bytes, seconds}], where kind is
                 send         one rank to another, on other hosts if there are several
                 send_on_host one rank to another of its host, if there are several hosts
                 all_to_all   bytes that each rank sends, to all others together
                 all_reduce   bytes of the buffer
    fit          {kind: {latency_s, bytes_per_s, ranks, error}}: seconds = latency_s + bytes / bytes_per_s;
                 error is the root mean square of the relative errors
    notes        [sentence]: what was left out
    findings     [{severity: "unusable" | "marked", about (column of the table, link or start), host ("" = none alone),
                 ranks, words}]
    unusable_hosts [name]
"""
