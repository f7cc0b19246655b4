import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { WebSocketServer } from "ws";
import { echo } from "./echo";

const build = JSON.parse(readFileSync(new URL("./build.json", import.meta.url), "utf8"));
const pages: Record<string, string> = { "/": "index.html", "/site.css": "site.css" };
const port = Number(process.env.PORT ?? 3000);

const server = createServer(async (request, response) => {
  const path = request.url ?? "/";
  const page = pages[path];
  if (page !== undefined) {
    response.end(readFileSync(new URL(`../public/${page}`, import.meta.url)));
  } else if (path === "/version") {
    response.end(JSON.stringify({ ...build, user: process.getuid?.() }));
  } else if (path === "/echo") {
    const answer = await echo(`ws://127.0.0.1:${port}`, "x".repeat(1000));
    // The shared object that bufferutil has loaded into this process.
    const maps = readFileSync("/proc/self/maps", "utf8").split("\n");
    const native = maps.find((line) => line.endsWith("bufferutil.node"))?.split(/\s+/).pop();
    response.end(JSON.stringify({ length: answer.length, native }));
  } else {
    response.writeHead(404).end();
  }
});

new WebSocketServer({ server }).on("connection", (socket) => {
  socket.on("message", (message) => socket.send(message));
});

server.listen(port, () => console.log(`listening on ${port}`));
