"""The baseline: the first guide's service, one pipeline call a request in four threads."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import String, Text, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from transformers import pipeline

engine = create_engine(os.environ["DATABASE_URL"])
generator = pipeline(
    "text-generation",
    model=os.environ["MODEL"],
    dtype=getattr(torch, os.environ.get("DTYPE", "float32")),
)
pool = ThreadPoolExecutor(max_workers=4)
app = FastAPI()


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "generation_records"
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str] = mapped_column(Text)
    generated_text: Mapped[str] = mapped_column(Text)
    model_name: Mapped[str] = mapped_column(String(100))


Base.metadata.create_all(engine)


class Prompt(BaseModel):
    prompt: str
    max_length: int = 50


def run(body: Prompt) -> str:
    answer = generator(body.prompt, max_length=body.max_length, max_new_tokens=None, do_sample=True)
    return str(answer[0]["generated_text"])


@app.get("/health/ready")
async def ready() -> str:
    return "ready"


@app.post("/generate")
async def generate(body: Prompt) -> dict[str, object]:
    text = await asyncio.get_running_loop().run_in_executor(pool, run, body)
    with Session(engine) as session:
        row = Row(prompt=body.prompt, generated_text=text, model_name="gpt2")
        session.add(row)
        session.commit()
        return {"id": row.id, "generated_text": text}
