export const links: Record<string, string | undefined> = {
  home: "https://example.org/",
  docs: "https://example.org/docs",
};
