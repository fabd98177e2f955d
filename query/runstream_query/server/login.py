"""Signing in with a browser: /login (a form, and who is signed in) and /logout. Plain pages without scripts.

The form is bound to the browser by a cookie that only our own pages send back; the session's cookie is `session.py`'s.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from html import escape
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from runstream_query.api.errors import ApiError
from runstream_query.api.wire import error_response

from .authenticator import TooManyTriesError
from .cookie import LOGIN, SESSION, Cookies
from .principal import Principal
from .session import Session

if TYPE_CHECKING:
    from .app import Server

MAX_FORM_BYTES: Final = 16_384
_MAX_NEXT_CHARS: Final = 2_000

_STYLE: Final = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1b1f24;--soft:#5b6470;--line:#d6dae0;--field:#fff;
--accent:#2457d6;--accent-ink:#fff;--bad:#b3261e;--bad-page:#fdecea}
@media(prefers-color-scheme:dark){:root{--page:#101317;--card:#191d23;--ink:#e8eaed;--soft:#9aa4b0;--line:#333a44;
--field:#12161b;--accent:#7aa2ff;--accent-ink:#0b1220;--bad:#ffb4ab;--bad-page:#3a1a18}}
*{box-sizing:border-box}
body{margin:0;min-height:100vh;display:grid;place-items:center;padding:24px;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{width:100%;max-width:384px;background:var(--card);border:1px solid var(--line);border-radius:14px;padding:32px;
box-shadow:0 1px 2px rgba(0,0,0,.05),0 12px 32px rgba(0,0,0,.07)}
.brand{display:flex;align-items:center;gap:10px;font-weight:600;color:var(--soft);margin:0 0 20px}
.brand svg{width:30px;height:30px;color:var(--accent)}
h1{font-size:22px;line-height:1.25;margin:0 0 20px;overflow-wrap:anywhere}
p{margin:0 0 20px;color:var(--soft)}
label{display:block;font-size:14px;font-weight:600;margin:0 0 6px}
input{width:100%;font:inherit;color:inherit;background:var(--field);border:1px solid var(--line);border-radius:9px;
padding:10px 12px;margin:0 0 18px}
button{width:100%;font:inherit;font-weight:600;border:0;border-radius:9px;padding:11px 12px;background:var(--accent);
color:var(--accent-ink);cursor:pointer}
button:hover{filter:brightness(1.08)}
input:focus-visible,button:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.bad{color:var(--bad);background:var(--bad-page);border-radius:9px;padding:10px 12px;margin:0 0 20px}
"""
_POLICY: Final = (
    "default-src 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_MARK: Final = (
    '<svg viewBox="0 0 32 32" fill="none" stroke="currentColor" stroke-width="3" stroke-linecap="round" '
    'aria-hidden="true"><path d="M3 9c6 0 6 5 12 5s6-5 14-5"/><path d="M3 17c6 0 6 5 12 5s6-5 14-5" opacity=".6"/>'
    '<path d="M3 25c6 0 6 3 12 3s6-3 14-3" opacity=".3"/></svg>'
)


def safe_next(wanted: str) -> str:
    """Where to go after signing in: a path of this server, or the page that says who is signed in."""
    printable = all("!" <= character <= "~" for character in wanted)
    if not wanted.startswith("/") or wanted.startswith("//") or "\\" in wanted or not printable:
        return "/login"
    if len(wanted) > _MAX_NEXT_CHARS or urlsplit(wanted).netloc or wanted in ("/", "/logout"):
        return "/login"
    return wanted


class Login:
    """The two pages, for one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._cookies = Cookies(server.settings)
        self._root = server.settings.root_path

    def routes(self) -> list[BaseRoute]:
        """Their paths."""
        return [
            Route("/login", self.form, methods=["GET"]),
            Route("/login", self.sign_in, methods=["POST"]),
            Route("/logout", self.sign_out, methods=["POST"]),
        ]

    async def form(self, request: Request) -> Response:
        """The form; for somebody who is signed in, who that is."""
        if not self._server.authenticator.enabled:
            return error_response(ApiError("ENDPOINT_NOT_FOUND", "This server has no users and needs no log-in."))
        found = self._found(request)
        if found is not None:
            return self._account(*found)
        return self._form(request, request.query_params.get("next", ""))

    async def sign_in(self, request: Request) -> Response:
        """Check the form; then a session begins."""
        authenticator = self._server.authenticator
        if not authenticator.enabled:
            return error_response(ApiError("ENDPOINT_NOT_FOUND", "This server has no users and needs no log-in."))
        fields = await self._fields(request)
        wanted = fields.get("next", "")
        nonce = self._cookies.read(request.scope.get("runstream_cookie"), LOGIN)
        bound = nonce is not None and hmac.compare_digest(
            fields.get("form", "").encode(), authenticator.sign_form(nonce).encode()
        )
        if not bound or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return self._form(request, wanted, "The form was out of date. Please sign in again.", status=403)
        name = fields.get("name", "")
        audit = self._server.audit
        try:
            principal = await authenticator.check_password(
                name, fields.get("password", ""), request.scope["runstream_address"]
            )
        except TooManyTriesError as exc:
            audit.note("login-failed", request.scope, status=429, user=name, reason="too many failed log-ins")
            said = f"Too many failed log-ins. Please wait {exc.retry_after_seconds} seconds."
            response = self._form(request, wanted, said, name=name, status=429)
            response.headers["Retry-After"] = str(exc.retry_after_seconds)
            return response
        if principal is None:
            audit.note("login-failed", request.scope, status=403, user=name, reason="wrong name or password")
            return self._form(request, wanted, "The name or the password is wrong.", name=name, status=403)
        audit.note("login", request.scope, user=name)
        response = RedirectResponse(self._root + safe_next(wanted), status_code=303)
        scope = request.scope
        for cookie in (
            self._cookies.write(scope, SESSION, authenticator.open_session(name)),
            self._cookies.write(scope, LOGIN, "", strict=True),
        ):
            response.headers.append("Set-Cookie", cookie.decode("ascii"))
        return response

    async def sign_out(self, request: Request) -> Response:
        """The session ends here, and its cookie is worth nothing from now on."""
        found = self._found(request)
        if found is not None:
            _, session = found
            fields = await self._fields(request)
            signature = self._server.authenticator.sign_form(session.id)
            if not hmac.compare_digest(fields.get("form", "").encode(), signature.encode()):
                return self._account(*found, status=403)
            self._server.authenticator.close_session(session)
            self._server.audit.note("logout", request.scope, user=session.name)
        response = RedirectResponse(f"{self._root}/login", status_code=303)
        response.headers.append("Set-Cookie", self._cookies.write(request.scope, SESSION, "").decode("ascii"))
        return response

    def _found(self, request: Request) -> tuple[Principal, Session] | None:
        cookie = self._cookies.read(request.scope.get("runstream_cookie"), SESSION)
        return None if cookie is None else self._server.authenticator.session_of(cookie)

    async def _fields(self, request: Request) -> dict[str, str]:
        declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared != "application/x-www-form-urlencoded":
            return {}
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FORM_BYTES:
                raise ApiError("INVALID_PARAMETER_VALUE", "The form is too large.", status=413)
        try:
            found = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=20, errors="strict")
        except ValueError:
            return {}
        return {name: values[0] for name, values in found.items()}

    def _form(self, request: Request, wanted: str, problem: str = "", *, name: str = "", status: int = 200) -> Response:
        nonce = secrets.token_urlsafe(24)
        signature = self._server.authenticator.sign_form(nonce)
        said = f'<p class="bad" role="alert">{escape(problem)}</p>' if problem else ""
        focus = ("", " autofocus") if name else (" autofocus", "")
        response = self._page(
            "Sign in",
            f"""<h1>Sign in</h1>{said}
<form method="post" action="{escape(self._root)}/login">
<input type="hidden" name="form" value="{signature}"><input type="hidden" name="next" value="{escape(wanted)}">
<label for="name">Name</label>
<input id="name" name="name" value="{escape(name)}" autocomplete="username" autocapitalize="none"
spellcheck="false" required{focus[0]}>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password"
required{focus[1]}>
<button>Sign in</button>
</form>""",
            status,
        )
        cookie = self._cookies.write(request.scope, LOGIN, nonce, strict=True)
        response.headers.append("Set-Cookie", cookie.decode("ascii"))
        return response

    def _account(self, principal: Principal, session: Session, *, status: int = 200) -> Response:
        limits = " for some experiments" if principal.restricted else ""
        signature = self._server.authenticator.sign_form(session.id)
        return self._page(
            "Signed in",
            f"""<h1>You are signed in as {escape(principal.name)}</h1>
<p>Your role is <b>{principal.role}</b>{limits}. MLflow clients sign in with your name and password,
or with a token.</p>
<form method="post" action="{escape(self._root)}/logout">
<input type="hidden" name="form" value="{signature}"><button>Sign out</button></form>""",
            status,
        )

    def _page(self, title: str, content: str, status: int) -> Response:
        page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title} · runstream</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><main><div class="brand">{_MARK}runstream</div>
{content}</main></body></html>"""
        return Response(
            page,
            status,
            {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"},
            media_type="text/html; charset=utf-8",
        )
