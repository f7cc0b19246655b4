module.exports = {
  home: "https://example.org/",
  docs: "https://example.org/docs",
};
