"""Authors and their books, for clients with a token."""

import os
import time
from collections import abc
from typing import Annotated

import jwt
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, status
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict
from sqlalchemy import ForeignKey, Identity, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

sessions = async_sessionmaker(create_async_engine(os.environ["DATABASE_URL"]), expire_on_commit=False)


async def get_session() -> abc.AsyncIterator[AsyncSession]:
    async with sessions.begin() as session:
        yield session


class Base(DeclarativeBase):
    """All tables; schema.sql makes them."""


class Author(Base):
    """Somebody who wrote books."""

    __tablename__ = "authors"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    name: Mapped[str]
    books: Mapped[list["Book"]] = relationship(lazy="raise", order_by="Book.id")


class Book(Base):
    """A book of one author."""

    __tablename__ = "books"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("authors.id", ondelete="CASCADE"))
    title: Mapped[str]


class BookOut(BaseModel):
    """A book as clients send and see it."""

    model_config = ConfigDict(from_attributes=True)
    title: str


class AuthorOut(BaseModel):
    """An author as clients send and see it, with all books."""

    model_config = ConfigDict(from_attributes=True)
    name: str
    books: list[BookOut]


def signed_in(credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    """Return who sent the token."""
    try:
        claims = jwt.decode(credentials.credentials, os.environ["TOKEN_KEY"], ["HS256"], {"require": ["sub", "exp"]})
    except jwt.InvalidTokenError:
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "The token is not valid.") from None
    return str(claims["sub"])


authors = APIRouter(prefix="/authors", tags=["authors"], dependencies=[Depends(signed_in)])
about = APIRouter(tags=["about"])


@authors.get("", response_model=list[AuthorOut])
async def list_authors(db: Annotated[AsyncSession, Depends(get_session)], prefix: str = "") -> abc.Sequence[Author]:
    """List the authors whose names start with a prefix, each with all books."""
    found = select(Author).where(Author.name.startswith(prefix, autoescape=True)).order_by(Author.name).limit(100)
    return (await db.scalars(found.options(selectinload(Author.books)))).all()


@authors.post("", response_model=AuthorOut, status_code=status.HTTP_201_CREATED)
async def add_author(new: AuthorOut, db: Annotated[AsyncSession, Depends(get_session)]) -> Author:
    """Store an author with all books, or nothing."""
    author = Author(name=new.name, books=[Book(title=book.title) for book in new.books])
    db.add(author)
    try:
        await db.flush()
    except IntegrityError:
        raise HTTPException(status.HTTP_409_CONFLICT, f"{new.name} is here already.") from None
    return author


@about.get("/about")
async def show_name(request: Request) -> dict[str, str]:
    """Say which service this is."""
    return {"service": request.app.title}


class Timing(BaseHTTPMiddleware):
    """Tells the client how long the service took."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Add Server-Timing to the answer."""
        began = time.perf_counter()
        response = await call_next(request)
        response.headers["Server-Timing"] = f"app;dur={1000 * (time.perf_counter() - began):.1f}"
        return response


app = FastAPI(
    title="Books",
    version="1.4.0",
)
app.include_router(authors)
app.include_router(about)
app.add_middleware(Timing)
app.add_middleware(GZipMiddleware, minimum_size=500)
app.add_middleware(CORSMiddleware, allow_origins=["https://books.example"], allow_headers=["Authorization"])
