// Vercel's AI SDK. packages: ai@7 @ai-sdk/openai-compatible@3 zod@4
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from 'ai';

const provider = createOpenAICompatible({ name: 'boomerang', baseURL: process.argv[2] + '/v1', supportsStructuredOutputs: true });
const shared = { model: provider('tiny:5L'), prompt: 'Weather?', temperature: 0, maxRetries: 0 };
const schema = jsonSchema({ type: 'object', properties: { city: { enum: ['Bern'] } }, required: ['city'],
  additionalProperties: false });
const checks = {
  text: async () => (await generateText({ ...shared, maxOutputTokens: 6 })).text.length > 0,
  stream: async () => {
    let text = '';
    for await (const part of streamText({ ...shared, maxOutputTokens: 6 }).textStream) text += part;
    return text.length > 0;
  },
  structured: async () => (await generateText({ ...shared, output: Output.object({ schema }) })).output.city === 'Bern',
  tools: async () => {
    const cities = [];
    const weather = tool({ description: 'of a city', inputSchema: schema,
      execute: async ({ city }) => { cities.push(city); return 'rain'; } });
    const answer = await generateText({ ...shared, tools: { weather }, toolChoice: 'required', maxOutputTokens: 250,
      stopWhen: stepCountIs(2) });
    return cities[0] === 'Bern' && answer.steps.length === 2;
  },
  embeddings: async () =>
    (await embedMany({ model: provider.embeddingModel('tiny:5L'), values: ['hi', 'ho'] })).embeddings[1].length === 64,
};
const results = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    results[name] = (await check()) ? 'yes' : 'no';
  } catch (error) {
    console.error(error);
    results[name] = String(error).split('\n')[0].slice(0, 200);
  }
}
console.log(JSON.stringify(results));
