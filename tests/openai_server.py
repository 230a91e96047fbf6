"""OpenAI-compatible servers on the loopback interface, for the tests of the client.

`ModelServer` answers from a real model on this machine. `FaultyServer` works off a script of faults first: each entry
is what happens to the next request ("ok" when the script is empty)."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Server:
    """Runs in threads of this process between `with` and its end; `requests` keeps what was asked."""

    def __init__(self):
        self.requests, self.headers, self.lock = [], [], threading.Lock()
        self.models = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept open, as by every real server

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append(body)
                    owner.headers.append({name.lower(): value for name, value in self.headers.items()})
                if self.path.endswith("/load_lora_adapter"):
                    return owner.load_adapter(self, body)
                owner.answer(self, body)

            def do_GET(self):
                listed = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in owner.models]
                reply(self, 200, json.dumps({"object": "list", "data": listed}).encode())

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *arguments: None  # clients that hang up are part of the tests
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def load_adapter(self, handler, body):
        reply(handler, 404, b'{"detail": "Not Found"}')


def reply(handler, status: int, body: bytes, headers: dict = {}, length: int | None = None):
    """Sends a response; `length` larger than the body promises more than comes."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(length or len(body)))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(text: str | None, finish: str = "stop", prompt_tokens: int = 10, answer_tokens: int = 5,
               logprobs=None) -> bytes:
    """Body of a chat completion."""
    return json.dumps({
        "id": "x", "object": "chat.completion", "created": int(time.time()), "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "logprobs": logprobs,
                     "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens,
                  "total_tokens": prompt_tokens + answer_tokens}}).encode()


class ModelServer(_Server):
    """Chat completions of a TransformersBackend, with the log-probabilities of the first token when asked for.

    Adapters of the same model are loaded as vLLM does it, by `/v1/load_lora_adapter`."""

    def __init__(self, backend):
        super().__init__()
        self.backend, self.model_lock = backend, threading.Lock()

    def answer(self, handler, body):
        from rlhi.generate import Sampling
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"], body.get("seed") or 0)
        with self.model_lock:
            backend = self.models.get(body["model"], self.backend)
            text = backend.chat([body["messages"]], sampling)[0]
            finish, logprobs = backend.last_stats["finish"][0], None
            if body.get("logprobs"):
                logprobs = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": self.first_tokens(body)}]}
        reply(handler, 200, completion(text, finish, logprobs=logprobs))

    def load_adapter(self, handler, body):
        from rlhi.generate import load_backend
        self.models[body["lora_name"]] = load_backend(self.backend.model_id, adapter=body["lora_path"], progress=False,
                                                        dtype=self.backend.dtype)
        reply(handler, 200, b"Success: LoRA adapter added")

    def first_tokens(self, body) -> list[dict]:
        import torch
        ids = torch.tensor([self.backend.tokens(body["messages"])])
        with torch.inference_mode():
            top = self.backend.model(ids, logits_to_keep=1).logits[0, -1].log_softmax(-1).topk(body["top_logprobs"])
        return [{"token": self.backend.tokenizer.decode([token]), "logprob": logprob}
                for token, logprob in zip(top.indices.tolist(), top.values.tolist())]


class FaultyServer(_Server):
    """Answers the last message in capitals, after the faults of its script."""

    def __init__(self, script=(), slow: float = 3.0):
        super().__init__()
        self.script, self.slow = list(script), slow

    def answer(self, handler, body):
        with self.lock:
            fault = self.script.pop(0) if self.script else "ok"
        text = body["messages"][-1]["content"].upper()
        if fault == "ok":
            reply(handler, 200, completion(text))
        elif fault == "never":
            time.sleep(self.slow)
        elif fault == "cut":
            reply(handler, 200, completion(text)[:60])
        elif fault == "twice":  # two whole responses to one request, on a connection that is kept open
            other = completion(text[::-1])
            body = completion(text)
            second = (f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(other)}\r\n\r\n").encode()
            handler.close_connection = False
            reply(handler, 200, body + second + other, length=len(body))
        elif fault == "two bodies":
            reply(handler, 200, completion(text) * 2)
        elif fault == "hang up":
            reply(handler, 200, completion(text)[:60], length=10_000)
        elif fault == "nonsense":
            reply(handler, 200, b'{"choices": []}')
        elif fault == "null":
            reply(handler, 200, completion(None))
        elif fault == "html":
            reply(handler, 200, b"<html>Bad gateway</html>")
        elif fault == "quota":
            reply(handler, 429, b'{"error": {"message": "no money left", "code": "insufficient_quota"}}')
        else:
            reply(handler, fault, b'{"error": {"message": "fault of the script"}}', {"Retry-After": "0.05"})
