"""The HTTP server: pictures by OpenAI's images convention, with the requests of many clients merged into batches.

`varkit/serve/app.py` joins the parts. Needs the extra `serve` (fastapi, uvicorn), and `ray` beyond one machine.
"""
