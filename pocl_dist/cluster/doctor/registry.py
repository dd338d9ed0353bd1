"""All checks, in the order in which a run would meet what they find; docs/doctor.md shows them."""

from __future__ import annotations

from pocl_dist.cluster.doctor.case import Check
from pocl_dist.cluster.doctor.checks import (
    devices,
    disk,
    hosts,
    lengths,
    machine,
    models,
    nodes,
    ranks,
    ray,
    rows,
    run_dir,
    software,
    tokenizers,
)
from pocl_dist.cluster.doctor.checks.asked import asked

_SOFTWARE = (
    Check(
        "known holes", "Software", "installed versions against known security holes", (77,),
        software.known_holes,
        "A run refuses to start with it.", "install a newer version (SECURITY.md)",
    ),
    Check(
        "packages", "Software", "required packages, their bounds and the tested versions", (70,),
        software.packages,
        "The step that needs it cannot start.", "pip install -c constraints.txt pocl_dist",
    ),
    Check(
        "extras", "Software", "packages of the trackers and of the harness, if asked for", (64,),
        software.extras,
        "A run refuses to start without them.",
        "pip install 'pocl_dist[track]', or 'pocl_dist[harness]'",
    ),
    Check(
        "compiler", "Software", "g++ and ninja, for the loss on CPUs and DeepSpeed's ops", (70,),
        software.compiler,
        "The op is built when the ranks start, and cannot be.",
        "install g++ and ninja, or set engine.offload_optimizer: none",
    ),
)  # fmt: skip
_RUN_DIRECTORY = (
    Check(
        "run directory", "Run directory", "what lies in it: another program's or version's files",
        (64, 78),
        asked("run directory", "nothing in it is in the way",
              "The results may differ from those that are there.",
              "use the versions it was begun with, or another run_dir"),
        "A run writes nothing where another program or version has written.",
        "choose another run_dir",
    ),
    Check(
        "lock", "Run directory", "whether another run is at work in it", (73,),
        asked("lock", "no other run holds it", "", ""),
        "Two runs may not write the same files.", "wait for it, stop it, or use another run_dir",
    ),
    Check(
        "earlier results", "Run directory", "whether results in it were made from this config",
        (64, 78),
        asked("resumed results", "nothing in it was made from another config",
              "It is not known whether the run would go on with them.",
              "`pocl-dist verify RUN_DIR` tells more"),
        "A step refuses to go on from results of another config (docs/resume.md).",
        "use the earlier values, or another run_dir",
    ),
    Check(
        "writing", "Run directory", "write, fsync, rename, exclusive creation on its file system",
        (74,), run_dir.writable,
        "A run writes checkpoints there and relies on renames being whole.",
        "set run_dir to a folder you may write, on a disk with room",
    ),
)  # fmt: skip
_DATA = (
    Check(
        "rows", "Data", "schema of the rows of every source, empty answers, repeated ids, enough "
        "rows for the stages", (65, 66, 69), rows.rows,
        "A run reads all rows before it loads a model, and stops at what it cannot use.",
        "mend or remove them; data.on_bad_row: quarantine leaves bad rows out and lists them",
    ),
    Check(
        "repeated rows", "Data", "rows that stand twice, and test questions in the training data",
        (), rows.repeated_rows, "", "",
    ),
    Check(
        "answer server", "Data", "the server of measure.engine: server", (64, 69, 77),
        asked(
            "answer server", "it answers", "", "",
            lambda config: config.measure.engine == "server",
        ),
        "measure asks it for the student's answers.", "start it, or set measure.engine: local",
    ),
)  # fmt: skip
_MODELS = (
    Check(
        "models", "Models", "teacher, student and adapters: there, whole by their headers, without "
        "pickles or code of their own", (66, 69, 74, 77), models.models,
        "No step can load it.",
        "correct the path, or download it where there is a network: hf download OWNER/NAME",
    ),
    Check(
        "layers, positions", "Models", "layers to keep and sequence lengths against the models",
        (64,), models.layers_and_positions,
        "A model has no position for what comes after its last one.",
        "shorter data.max_tokens, data.max_prompt_tokens or generation.max_new_tokens",
    ),
    Check(
        "tokenizers", "Models", "vocabulary, eos and head rows of teacher and student",
        (64, 66, 78),
        tokenizers.tokenizers,
        "Column i of both models must mean the same token.",
        "take both models from one family, or train the student with the teacher's tokenizer",
    ),
    Check(
        "architecture", "Models", "whether transformers has it, and whether its head is linear",
        (66,), models.architectures,
        "No step can load it.", "pip install -U transformers, or choose another model",
    ),
    Check(
        "LoRA", "Models", "names of the layers to adapt", (64,), models.lora,
        "The student cannot be built.", "",
    ),
    Check(
        "hub token", "Models", "whether the file with your token for the hub is private", (),
        models.hub_token, "", "",
    ),
    Check(
        "template", "Data", "the template on the first row: chat template, room, eos", (64, 65, 78),
        lengths.template,
        "Every row is rendered with it.", "choose another data.template, or longer bounds",
    ),
    Check(
        "lengths", "Data", "a sample of all rows in tokens: how long, how many are cut", (64, 65),
        lengths.lengths,
        "A row that cannot be rendered stops the run.", "mend the row, or choose another template",
    ),
)  # fmt: skip
_MACHINES = (
    Check(
        "free disk", "Run directory", "free space against checkpoints, export and teacher cache",
        (74,), disk.free_disk,
        "The run stops when it saves.", "make room, or set run_dir to a larger disk",
    ),
    Check(
        "batch", "Ranks", "global batch over the ranks, a device for each, dtype", (64,),
        ranks.batch,
        "Ranks that differ in rows, or lack a device, cannot start.",
        "a multiple of the ranks; --nodes and --gpus-per-node tell doctor where it will run",
    ),
    Check(
        "launcher", "Ranks", "RANK, WORLD_SIZE, MASTER_*, SLURM_*: together, as the config says",
        (64, 69), ranks.launcher_variables,
        "Ranks would not find each other, or take the same GPU.",
        "start the ranks with one of the files of launch/ (pocl-dist launch)",
    ),
    Check(
        "hosts", "Ranks", "the hostfile, and every host in it over ssh", (64, 66, 69), hosts.hosts,
        "deepspeed would train on this machine alone, or wait for a password.",
        "mend launch.hostfile; `ssh -o BatchMode=yes HOST true` must work",
    ),
    Check(
        "port", "Ranks", "whether the port of rank 0 is free", (69,), hosts.ports,
        "The ranks cannot meet.", "end what listens there, or choose launch.master_port",
    ),
    Check(
        "Ray", "Ray", "token settings; an existing cluster is reached, and not open to everyone",
        (64, 69, 77), ray.ray,
        "measure, generate, cache and evaluate need it.",
        "ray.address: null starts a local Ray; SECURITY.md says how a cluster is started",
    ),
    Check(
        "text encoding", "Machine", "UTF-8", (), machine.text_encoding, "", "",
    ),
    Check(
        "open files", "Machine", "ulimit -n", (), machine.limits, "", "",
    ),
    Check(
        "shared memory", "Machine", "size of /dev/shm", (), machine.shared_memory, "", "",
    ),
    Check(
        "scratch", "Machine", "temporary folder and run.scratch_dir can be written", (74,),
        machine.scratch,
        "Ray, compilers and copies need it.", "set TMPDIR or run.scratch_dir to a folder of yours",
    ),
    Check(
        "clock", "Machine", "this clock against the file server's", (), nodes.server_clock, "", "",
    ),
    Check(
        "GPUs", "Compute node", "count, memory, bf16, CUDA and NCCL", (64, 69, 71), devices.gpus,
        "The ranks find no usable GPU.", "ask the scheduler for GPUs; check driver and torch build",
    ),
    Check(
        "all-reduce", "Compute node", "bandwidth of NCCL over the GPUs here or of the job", (71,),
        devices.bandwidth,
        "Training would hang or fail in its first step.", "NCCL_DEBUG=INFO tells the reason",
    ),
    Check(
        "other nodes", "Compute node", "shared folder, clocks and packages of all nodes of a job",
        (69, 71), nodes.other_nodes,
        "All ranks write into one run directory.",
        "set run_dir to a folder of the shared file system, by the same path on all nodes",
    ),
)  # fmt: skip

CHECKS: tuple[Check, ...] = (*_SOFTWARE, *_RUN_DIRECTORY, *_DATA, *_MODELS, *_MACHINES)
