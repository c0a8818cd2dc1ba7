"""What the user reads before and after training."""

from __future__ import annotations

from pathlib import Path

from distllm.config.schema import Config
from distllm.data.prepared import PreparedData
from distllm.data.tokenizer import TextTokenizer
from distllm.layout.grid import Grid
from distllm.metrics.goodput import account, describe
from distllm.metrics.plots import plot_loss
from distllm.metrics.run_directory import RunDirectory
from distllm.metrics.sinks import read_rows
from distllm.metrics.summary import EndFacts, StartFacts, end_summary, start_summary
from distllm.model.parameters import count_parameters
from distllm.plan.memory import estimate_memory
from distllm.trainer.completion import sample_tokens
from distllm.trainer.job import Job
from distllm.trainer.open_data import OpenedData, planned_samples
from distllm.trainer.resume import Start


def describe_start(config: Config, prepared: PreparedData, data: OpenedData, grid: Grid, start: Start) -> str:
    """Return the summary of what will run, with the arithmetic behind it."""
    model, train = config.model, config.train
    samples = planned_samples(config, start.state)
    sizes = {name: source.sequences.num_sequences for name, source in data.training.sources.items()}
    return start_summary(
        StartFacts(
            run_dir=Path(config.run.dir),
            model_name=model.name,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            vocab_size=prepared.vocab_size,
            seq_length=model.seq_length,
            num_parameters=count_parameters(model, prepared.vocab_size).total,
            precision=train.precision,
            zero_stage=config.zero.stage,
            grid=str(grid),
            data_parallel=grid.data,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            steps=train.steps,
            resume_step=start.state.step,
            training_tokens=sum(source.train.num_tokens for source in prepared.sources.values()),
            source_epochs={
                name: (samples.get(name, 0) / max(sum(samples.values()), 1), samples.get(name, 0) / size)
                for name, size in sizes.items()
            },
            memory_bytes_per_rank=estimate_memory(config, prepared.vocab_size, grid),
            resumed_from=start.path,
        )
    )


def finish_outputs(job: Job, seconds: float) -> None:
    """Write the last text sample and the loss plot, and print the closing summary.

    Collective, since ranks may share the model.
    """
    text = sample_text(job) if job.config.logging.sample_tokens > 0 else None
    if not job.reporter.is_main:
        return
    run, config = job.reporter.run, job.config
    if text is not None:
        with open(run.samples_path, "a", encoding="utf-8") as file:
            file.write(f"=== step {config.train.steps} ===\n{text}\n")
    plot_loss(read_rows(run.metrics_path), run.loss_plot_path, f"{config.model.name}, {run.path}")
    validation = job.reporter.last_validation_row or {}
    training = job.reporter.last_training_row or {}
    steps_done = config.train.steps - job.start.step
    tokens = steps_done * config.train.global_batch_size * config.model.seq_length
    files = {"loss plot": run.loss_plot_path, "metrics": run.metrics_path, "config": run.config_path}
    if config.checkpoint.interval:
        files["checkpoints"] = run.checkpoints_path
    if text is not None:
        files["samples"] = run.samples_path
    facts = EndFacts(
        step=config.train.steps,
        steps=config.train.steps,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        loss=training.get("loss"),
        validation_loss=validation.get("validation_loss"),
        validation_bits_per_byte=validation.get("validation_bits_per_byte"),
        gzip_bits_per_byte=job.validation.gzip_bits_per_byte if job.validation else None,
        goodput=goodput(run),
        files=files,
        sample=text,
    )
    job.reporter.say(end_summary(facts))


def goodput(run: RunDirectory) -> str:
    """Return a description of what the run's time so far was spent on."""
    return describe(account(run.read_events(), read_rows(run.metrics_path), run.last_sign() or 0.0))


def sample_text(job: Job) -> str:
    """Return `logging.sample_prompt` and the model's continuation, equal on all ranks. Collective."""
    tokenizer = TextTokenizer.load(job.prepared.tokenizer_folder, job.config.tokenizer.end_of_document)
    prompt = tokenizer.encode(job.config.logging.sample_prompt) or [tokenizer.end_of_document]
    tokens = sample_tokens(
        lambda window: job.engine.logits(window, job.prepared.vocab_size),
        prompt,
        max_tokens=job.config.logging.sample_tokens,
        seq_length=job.config.model.seq_length,
        end_of_document=tokenizer.end_of_document,
        temperature=job.config.generate.temperature,
        top_k=job.config.generate.top_k,
        seed=job.config.train.seed,
        device=job.runtime.device,
    )
    return job.config.logging.sample_prompt + tokenizer.decode(tokens)
