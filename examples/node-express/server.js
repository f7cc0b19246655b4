import express from "express";

const version = "1";

const app = express();
app.disable("x-powered-by");

app.get("/", (request, response) => {
  response.type("text").send(`Hello from Express, version ${version}\n`);
});

const server = app.listen(Number(process.env.PORT ?? 3000), (error) => {
  if (error) throw error;
  console.log(`listening on port ${server.address().port}`);
});

process.on("SIGTERM", () => server.close(() => process.exit(0)));
