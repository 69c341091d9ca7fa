"""The studio, varkit's web page: pictures drawn, edited, taken apart and compared in a browser.

One file a page; `varkit/studio/app.py` joins them. Models are shared between visitors and only read; every run has a
state of its own. Needs the extra `studio` (gradio).
"""
