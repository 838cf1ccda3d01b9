"""Request formats, log-likelihood scoring, metrics, suites and perplexity."""

from olmax.evaluation.perplexity import Perplexity, batch_losses, perplexity
from olmax.evaluation.requests import Question, Request, Task, read_requests, read_task, read_tasks
from olmax.evaluation.scoring import Score, score
from olmax.evaluation.suite import Results, Suite, TaskResult, evaluate

__all__ = [
    "Perplexity",
    "Question",
    "Request",
    "Results",
    "Score",
    "Suite",
    "Task",
    "TaskResult",
    "batch_losses",
    "evaluate",
    "perplexity",
    "read_requests",
    "read_task",
    "read_tasks",
    "score",
]
