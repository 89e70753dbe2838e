"""`uvicorn --factory serve_fastapi:app`, then `curl 'localhost:8000/pair?seed=7' -o pair.zip`."""

import asyncio
import io
import zipfile

from fastapi import FastAPI, HTTPException, Response

from dualdiff_engine import DualDiffError, Engine
from dualdiff_engine.demo.presets import BASE, PRESETS


def app(most: int = 8, **given: object) -> FastAPI:
    served, one, now = FastAPI(), asyncio.Lock(), {"waiting": 0, "drawn": 0, "broken": 0}
    engine = Engine.from_pretrained(BASE, adapter=(hole := PRESETS["fabric/hole"]).adapter)

    @served.get("/pair")
    async def pair(seed: int) -> Response:
        if now["waiting"] >= most:
            raise HTTPException(503, "busy: ask again later")
        now["waiting"] += 1
        try:
            async with one:
                (made,) = await asyncio.to_thread(engine.generate, [seed], **hole.options() | given)
        except Exception as why:
            # not the request's fault, such as a GPU's: who reads /health starts the server again
            now["broken"] += not isinstance(why, DualDiffError)
            raise HTTPException(400 if isinstance(why, ValueError) else 500, str(why)) from why
        finally:
            now["waiting"] -= 1
        now["drawn"] += 1
        with zipfile.ZipFile(content := io.BytesIO(), "w") as files:
            for kind in ("image", "anomaly", "mask"):
                with files.open(f"{kind}.png", "w") as file:
                    getattr(made, kind).save(file, "png")
        return Response(content.getvalue(), media_type="application/zip")

    served.get("/health")(lambda: Response(status_code=503 if now["broken"] else 200))
    served.get("/metrics")(lambda: Response("".join(f"dualdiff_{k} {n}\n" for k, n in now.items())))
    return served
