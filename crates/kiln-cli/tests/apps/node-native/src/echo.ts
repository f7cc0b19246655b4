import WebSocket from "ws";

/** Sends a message over a connection of its own and waits for it to come back. */
export function echo(url: string, message: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(url);
    socket.on("error", reject);
    socket.on("open", () => socket.send(message));
    socket.on("message", (data) => {
      socket.close();
      resolve(String(data));
    });
  });
}
