// Serves the files of a built site. PORT: where (3000). SITE: which folder. SINGLE_PAGE=1: unknown pages give index.html.
import { createReadStream, realpathSync } from "node:fs";
import { open, realpath } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, sep } from "node:path";
import { pipeline } from "node:stream";

const root = realpathSync(process.env.SITE ?? "/app/site");
const singlePage = process.env.SINGLE_PAGE === "1";
const types = {
  ".avif": "image/avif", ".css": "text/css; charset=utf-8", ".csv": "text/csv; charset=utf-8", ".gif": "image/gif",
  ".htm": "text/html; charset=utf-8", ".html": "text/html; charset=utf-8", ".ico": "image/x-icon", ".jpeg": "image/jpeg",
  ".jpg": "image/jpeg", ".js": "text/javascript; charset=utf-8", ".json": "application/json", ".map": "application/json",
  ".mjs": "text/javascript; charset=utf-8", ".mp4": "video/mp4", ".pdf": "application/pdf", ".png": "image/png",
  ".svg": "image/svg+xml", ".txt": "text/plain; charset=utf-8", ".wasm": "application/wasm", ".webm": "video/webm",
  ".webmanifest": "application/manifest+json", ".webp": "image/webp", ".woff": "font/woff", ".woff2": "font/woff2",
  ".xml": "application/xml",
};

// The open file at a URL path, or null. Nothing outside the folder, no dot files, no link that leads out.
async function find(path) {
  const names = path.split("/").filter((name) => name !== "");
  if (names.some((name) => name.startsWith(".") && name !== ".well-known")) return null;
  if (names.some((name) => /[\\\0]/.test(name))) return null;
  const wanted = join(root, ...names);
  const candidates = path.endsWith("/") ? [join(wanted, "index.html")] : [wanted, `${wanted}.html`, join(wanted, "index.html")];
  for (const candidate of candidates) {
    let file;
    try {
      const real = await realpath(candidate);
      if (!real.startsWith(root + sep)) continue;
      file = await open(real, "r");
      const stat = await file.stat();
      if (stat.isFile()) return { file, stat, name: real };
      await file.close();
    } catch (error) {
      await file?.close();
      if (!["ENOENT", "ENOTDIR", "EISDIR", "EACCES", "ELOOP", "ENAMETOOLONG"].includes(error.code)) throw error;
    }
  }
  return null;
}

function refuse(response, status, text, headers = {}) {
  response.writeHead(status, { "content-type": "text/plain; charset=utf-8", ...headers });
  response.end(`${text}\n`);
}

async function serve(request, response) {
  if (request.method !== "GET" && request.method !== "HEAD") return refuse(response, 405, "method not allowed", { allow: "GET, HEAD" });
  let path;
  try {
    path = decodeURIComponent(request.url.split("?")[0].split("#")[0]);
  } catch {
    return refuse(response, 400, "bad request");
  }
  if (!path.startsWith("/") || path.split("/").includes("..")) return refuse(response, 400, "bad request");
  let found = await find(path);
  let status = 200;
  if (found === null) {
    const page = extname(path) === "" || (request.headers.accept ?? "").includes("text/html");
    found = singlePage && page ? await find("/index.html") : await find("/404.html");
    if (!singlePage || !page) status = 404;
  }
  if (found === null) return refuse(response, 404, "not found");
  const { file, stat, name } = found;
  const tag = `"${stat.size.toString(16)}-${Math.trunc(stat.mtimeMs).toString(16)}"`;
  // Build tools put a hash of the content into the names of what they build.
  const hashed = /[.-][A-Za-z0-9_-]{8,}\.[a-z0-9]+$/.test(name) && name.includes(`${sep}assets${sep}`);
  const headers = {
    "content-type": types[extname(name).toLowerCase()] ?? "application/octet-stream",
    "content-length": stat.size,
    "cache-control": hashed ? "public, max-age=31536000, immutable" : "no-cache",
    "last-modified": stat.mtime.toUTCString(),
    "x-content-type-options": "nosniff",
    etag: tag,
  };
  const fresh = (request.headers["if-none-match"] ?? "").split(/\s*,\s*/).some((one) => one.replace(/^W\//, "") === tag);
  if (status === 200 && fresh) {
    await file.close();
    delete headers["content-length"];
    response.writeHead(304, headers);
    return response.end();
  }
  response.writeHead(status, headers);
  if (request.method === "HEAD" || stat.size === 0) {
    await file.close();
    return response.end();
  }
  pipeline(createReadStream(name, { fd: file, end: stat.size - 1 }), response, () => {});
}

const server = createServer((request, response) => {
  serve(request, response).catch((error) => {
    console.error(error);
    if (response.headersSent) response.destroy();
    else refuse(response, 500, "internal error");
  });
});
server.listen(Number(process.env.PORT ?? 3000), () => console.log(`serving ${root} on port ${server.address().port}`));
for (const signal of ["SIGTERM", "SIGINT"]) {
  process.on(signal, () => {
    server.close(() => process.exit(0));
    server.closeAllConnections();
  });
}
