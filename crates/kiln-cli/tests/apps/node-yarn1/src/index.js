const Koa = require("koa");
const ms = require("ms");
const links = require("./links");

const started = Date.now();
const app = new Koa();

app.use(async (context) => {
  if (context.path === "/") {
    context.body = { name: "links", up: ms(Date.now() - started), user: process.getuid(), links: Object.keys(links) };
    return;
  }
  const target = links[context.path.slice(1)];
  if (target === undefined) {
    context.throw(404, "no such link");
  }
  context.redirect(target);
});

app.listen(process.env.PORT || 3000);
