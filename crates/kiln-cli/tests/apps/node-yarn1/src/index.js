const polka = require("polka");
const ms = require("ms");
const links = require("./links");

const started = Date.now();
const app = polka();

app.get("/", (request, response) => {
  const about = { name: "links", up: ms(Date.now() - started), user: process.getuid(), links: Object.keys(links) };
  response.writeHead(200, { "content-type": "application/json" });
  response.end(JSON.stringify(about));
});

app.get("/:name", (request, response) => {
  const target = links[request.params.name];
  response.writeHead(target === undefined ? 404 : 302, target === undefined ? {} : { location: target });
  response.end(target === undefined ? "no such link" : `Redirecting to ${target}`);
});

app.listen(process.env.PORT || 3000);
