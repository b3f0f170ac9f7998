"""This service's engine behind one route that stores nothing: what storing costs."""

import gc
import os
import sys
from typing import Any

import anyio.to_thread
from fastapi import FastAPI

from engine.engine import Engine
from engine.loading import load_model
from main import SWITCH_SECONDS
from models import GenerateRequest
from services.planning import plan_prompt

app = FastAPI()
model = load_model(os.environ["MODEL"], os.environ.get("DTYPE", "auto"), "cpu")
engine = Engine(model, max_waiting=1024)
sys.setswitchinterval(SWITCH_SECONDS)
gc.collect()
gc.freeze()


@app.get("/health/ready")
async def ready() -> str:
    anyio.to_thread.current_default_thread_limiter().total_tokens = 400
    return "ready"


@app.post("/generate")
def generate(request: GenerateRequest) -> dict[str, Any]:
    plan = plan_prompt(model, request.prompt, request)
    with engine.admit(plan.prompt_ids, plan.params) as generation:
        generation.start()
        completion = generation.result()
    return {"generated_text": request.prompt + completion.text}
